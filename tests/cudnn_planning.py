"""Run by test_cudnn_frontend: real cuDNN plans for devices that are not here, told of them as its ahead-of-time planning is.

cuDNN's engines are linked against the driver, which a machine without a GPU lacks: a library of the same name stands in its
place, which loads nothing and says that it did. Nothing is executed.
"""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from ringsim.backends.cuda_tiles import Band
from ringsim.backends.cudnn_limits import ORDERED_DQ, Given, bounds_of, misfits, refusals
from ringsim.backends.cudnn_plans import Problem, build, layout_of, load
from ringsim.dtypes import numpy_dtype
from ringsim.errors import DeviceError

from .paper_cudnn import PaperCudnn

FAIL = """cuModuleGetFunction cuModuleLoadData cuModuleUnload cuTensorMapEncodeIm2col cuTensorMapEncodeTiled cuInit
cuCtxGetCurrent cuCtxGetLimit cuCtxPopCurrent cuCtxPushCurrent cuDeviceGet cuDeviceGetCount cuLaunchCooperativeKernel
cuLaunchKernel cuLaunchKernelEx cuLibraryLoadFromFile cuLinkAddData cuLinkComplete cuLinkCreate cuLinkDestroy cuStreamGetCtx"""
PASS = "cuKernelSetAttribute cuLibraryUnload cuFuncSetAttribute"
GIVE = "cuLibraryLoadData cuLibraryGetKernel cuKernelGetFunction"
COUNT = """cuKernelGetAttribute cuFuncGetAttribute cuOccupancyMaxPotentialClusterSize cuOccupancyMaxActiveClusters
cuOccupancyMaxActiveBlocksPerMultiprocessor"""
OTHERS = """int cuDriverGetVersion(int *to) { *to = 13000; return 0; }
int cuGetErrorString(int code, const char **to) { *to = "no driver"; return 0; }
int cuGetErrorName(int code, const char **to) { *to = "no driver"; return 0; }
int cuGetProcAddress_v2(const char *name, void **to, int version, unsigned long flags, void *status) { *to = 0; return 500; }
"""
KILO = 1 << 10
SHARED = {80: (163, 164), 89: (99, 100), 90: (227, 228), 100: (227, 228), 120: (99, 100)}
"""Of a block and of a multiprocessor in KiB: CUDA C++ Programming Guide, 'Compute Capabilities'."""


def load_driver(folder):
    """Build the library and load it for all that follow."""
    bodies = [(FAIL, "(void) { return 100; }"), (PASS, "(void) { return 0; }")]
    bodies += [(GIVE, "(void **to) { *to = (void *)8; return 0; }"), (COUNT, "(int *to) { *to = 1; return 0; }")]
    text = OTHERS + "".join(f"int {name}{body}\n" for names, body in bodies for name in names.split())
    source, library = Path(folder, "driver.c"), Path(folder, "libcuda.so.1")
    source.write_text(text)
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source], check=True)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


def device(cudnn, arch):
    """The properties of a device, as cuDNN 9.28 reads them."""
    block, unit = SHARED[arch]
    threads = 1536 if arch in (89, 120) else 2048
    said = {
        "maxGridSize": [2**31 - 1, 65535, 65535],
        "maxBlockSize": [1024, 1024, 64],
        "cudaDeviceId": 0,
        "deviceVer": arch * 10,
        "driverVer": 13000,
        "regsPerBlock": 65536,
        "multiProcessorCount": 132,
        "smCountOrigin": 0,
        "warpSize": 32,
        "maxSharedMemoryPerBlock": 48 * KILO,
        "maxSharedMemoryPerBlockOptin": block * KILO,
        "maxSharedMemoryPerSM": unit * KILO,
        "oversizedSharedMemoryPerBlock": 0,
        "reservedSharedMemoryPerBlock": KILO,
        "maxRegistersPerSM": 65536,
        "maxCtasPerSM": 32,
        "maxThreadsPerBlock": 1024,
        "maxThreadsPerSM": threads,
        "pciDeviceId": 0,
        "pciBusId": 0,
        "isTccDriver": 0,
        "supportCoopLaunch": 1,
        "smClockRateKHz": 1980000,
        "memClockRateKHz": 3201000,
        "memoryBusWidth": 6144,
        "l2CacheSize": 50 << 20,
        "totalGlobalMem": 80 << 30,
        "deviceName": f"sm_{arch}",
        "integrated": 0,
    }
    return cudnn.create_device_properties(json.dumps(said))


def arrays_of(case):
    """Operands of a case, forward or backward, of zeros that take no memory."""
    batch, rows, keys, heads, kv_heads, width, v_width = case["shape"]
    dtype, room = numpy_dtype(case["dtype"]), case["room"]

    def rows_of(count, of, wide):
        whole = np.broadcast_to(np.zeros((), dtype), (batch, count + room, of, wide))
        strides = np.array([(count + room) * of * wide, of * wide, wide, 1]) * dtype.itemsize
        return np.lib.stride_tricks.as_strided(whole, (batch, count, of, wide), strides)

    q, k, v = rows_of(rows, heads, width), rows_of(keys, kv_heads, width), rows_of(keys, kv_heads, v_width)
    out = rows_of(rows, heads, v_width)
    lse = np.zeros((batch, heads, rows + room), np.float32)[..., :rows]
    return [q, k, v, out, lse] if not case["backward"] else [q, k, v, out, out, lse, q, k, v]


def tried(cudnn, case, properties):
    """What our limits, cuDNN, and cuDNN on paper say of a case."""
    arch, most = case["arch"], case["most_scores"]
    given = Given(cudnn.backend_version(), (arch // 10, arch % 10))
    band = None if case["band"] is None else Band(*case["band"])
    arrays = arrays_of(case)
    inputs = arrays[:3] if not case["backward"] else [*arrays[:3], arrays[4]]
    widths = (arrays[0].shape[3], arrays[2].shape[3])
    found = [*refusals(given, case["dtype"], widths, band, backward=case["backward"])]
    found += misfits(given, inputs, band, most_scores=most)
    problem = Problem(case["dtype"], tuple(map(layout_of, arrays)), *bounds_of(band), 0.125)
    limit = most if arch == 90 and case["backward"] and given.version >= ORDERED_DQ else None
    paper = PaperCudnn(version=given.version, capability=given.capability)
    said = {"ours": found, "paper": planned(paper, problem, {"handle": None})}
    return said | {"cudnn": planned(cudnn, problem, {"sm_version": arch, "device_property": properties[arch]}, limit)}


def planned(cudnn, problem, options, limit=None):
    """Engine and workspace, or why there is none."""
    try:
        plan = build(cudnn, problem, options, limit)
    except DeviceError as error:
        return {"refused": str(error)}
    return {"engine": plan.engine, "workspace": plan.workspace_nbytes}


def main():
    folder, cases = sys.argv[1], json.load(sys.stdin)
    load_driver(folder)
    cudnn = load()
    properties = {arch: device(cudnn, arch) for arch in SHARED}
    Path(folder, "results.json").write_text(json.dumps([tried(cudnn, case, properties) for case in cases]))


if __name__ == "__main__":
    main()
