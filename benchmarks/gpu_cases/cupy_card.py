"""The card by CuPy: kernels and calls that only measuring needs. Thin, for only a GPU can test it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from ringsim.backends.cuda import Calls, DeviceArray, Kernel, Stream
from ringsim.backends.cuda_attend import OwnTiles
from ringsim.backends.cuda_sources import definitions, text_of
from ringsim.backends.cuda_tiles import Tiles
from ringsim.backends.cupy_calls import CupyCalls, load
from ringsim.dtypes import numpy_dtype
from ringsim.errors import DeviceError, MissingDependency

from .card import MakeTiles, OneCall

SPIN: Final = r"""
extern "C" __global__ void spin(unsigned long long nanoseconds) {
  unsigned long long begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  do { asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); } while (now - begin < nanoseconds);
}
"""
NORMAL: Final = """
unsigned long long z = (i + 1ULL) * 0x9E3779B97F4A7C15ULL + seed * 0xD1B54A32D192ED03ULL;
z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL; z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL; z ^= z >> 31;
float u = ((float)(unsigned)(z >> 40) + 0.5f) * 5.9604645e-8f, w = (float)(unsigned)(z & 0xFFFFFFU) * 5.9604645e-8f;
x = sqrtf(-2.0f * logf(u)) * cospif(2.0f * w);
"""
"""Box and Muller over splitmix64 of the index: no library of random numbers is needed."""
NVIDIA_SMI: Final = ",".join(
    (
        "name,uuid,driver_version,pstate,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem",
        "power.limit,temperature.gpu,mig.mode.current",
    )
)


class CupyCard:
    """`Card` of device 0 of those that are visible. Raises MissingDependency, DeviceError."""

    def __init__(self, *, exact_allocations: bool = False) -> None:
        self.xp = load()
        if exact_allocations:
            # each array an allocation of its own, so that a memory checker sees where it ends
            self.xp.cuda.set_allocator(None)
        self.calls: Calls = CupyCalls(0)
        self._own = self.calls
        self.kinds, self.missing = self._fused()
        self._spin = self.xp.RawKernel(SPIN, "spin")
        self._normal = self.xp.ElementwiseKernel("uint64 seed", "float32 x", NORMAL, "ringsim_normal")

    def _fused(self) -> tuple[Mapping[str, MakeTiles], Mapping[str, str]]:
        kinds: dict[str, MakeTiles] = {}
        missing: dict[str, str] = {}
        try:
            from ringsim.backends import cudnn

            cudnn.load()
            capability = CupyCalls(0).capability
            kinds["cudnn"] = lambda calls: cudnn.CudnnTiles(calls, capability=capability)
        except MissingDependency as error:
            missing["cudnn"] = str(error)
        kinds["own"] = OwnTiles
        kinds["own plain"] = lambda calls: OwnTiles(calls, plain=True)
        return kinds, missing

    def tiles(self, calls: Calls) -> tuple[Tiles, ...]:
        """Those of cuDNN where it is installed, then our own."""
        return tuple(self.kinds[name](calls) for name in ("cudnn", "own") if name in self.kinds)

    def one_call(self, *, ordered: bool) -> OneCall:
        """That of `one_call`."""
        from .one_call import CudnnCall

        return CudnnCall(self.calls, ordered=ordered)

    def build(self, kernel: Kernel) -> None:
        """By NVRTC, as CupyCalls will: CuPy keeps what it made on disk."""
        try:
            self.xp.cuda.runtime.setDevice(0)
            module = self.xp.RawModule(code=text_of(kernel.source), options=("-std=c++17", *definitions(kernel.types)))
            module.get_function(kernel.name)
        except self.xp.cuda.compiler.CompileException as error:
            raise DeviceError(f"{kernel.source} with {dict(kernel.types)}: {error}") from error

    def facts(self) -> dict[str, Any]:
        """The device, its clocks now, driver and libraries."""
        found = CupyCalls(0).facts()
        for name, make in self.kinds.items():
            if name == "cudnn":
                found |= {key: value for key, value in make(self.calls).facts().items() if key != "cudnn_plans"}
        return found | {"missing": dict(self.missing), "nvidia_smi": _asked(), "free_nbytes": self.free_nbytes()}

    def exact(self, array: DeviceArray) -> Any:
        """Converted on the device; bfloat16 by its bits, for not every CuPy computes with it."""
        self.settle()
        made = (widened(array) if array.dtype.name == "bfloat16" else array).astype(np.float64)
        self.settle()
        return made

    def upload(self, array: Any) -> DeviceArray:
        """By CuPy; bfloat16 by its bits."""
        host = np.ascontiguousarray(array)
        made = self.xp.asarray(host.reshape(-1).view(np.uint8)).view(host.dtype).reshape(host.shape)
        self.settle()
        return made

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> DeviceArray:
        """Rounded to nearest, ties to even."""
        drawn = self._normal(np.uint64(seed), size=int(np.prod(shape)))
        made = narrowed(drawn) if dtype == "bfloat16" else drawn.astype(numpy_dtype(dtype))
        self.settle()
        return made.reshape(shape)

    def spin(self, stream: Stream, seconds: float) -> None:
        """One thread that looks at the clock."""
        with stream:
            self._spin((1,), (1,), (np.uint64(seconds * 1e9),))

    def settle(self) -> None:
        """By cudaDeviceSynchronize: for measuring alone."""
        try:
            self.xp.cuda.runtime.deviceSynchronize()
        except self.xp.cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(f"the device failed: {error}") from error

    def free_nbytes(self) -> int:
        """By cudaMemGetInfo, after what CuPy's pool held and nobody uses has been given back."""
        self.xp.get_default_memory_pool().free_all_blocks()
        return int(self.xp.cuda.runtime.memGetInfo()[0])

    def pool_nbytes(self) -> int:
        """Of CuPy's pool."""
        return int(self.xp.get_default_memory_pool().total_bytes())

    def matmul(self, rows: int, dtype: str, stream: Stream) -> Callable[[], None]:
        """By cuBLAS."""
        from ringsim.backends.cuda_matmul import matmul_by_cublas

        product = matmul_by_cublas()
        a, b, c = (self.normal((rows, rows), dtype, seed) for seed in range(3))
        return lambda: product(a, b, c, stream)


def widened(array: DeviceArray) -> DeviceArray:
    """A bfloat16 array in float32, dense."""
    return (array.view(np.uint16).astype(np.uint32, order="C") << np.uint32(16)).view(np.float32)


def narrowed(array: DeviceArray) -> DeviceArray:
    """A finite float32 array in bfloat16, rounded to nearest, ties to even; its memory is used."""
    bits = array.view(np.uint32)
    bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    bits >>= np.uint32(16)
    return bits.astype(np.uint16).view(numpy_dtype("bfloat16"))


def _asked() -> dict[str, str] | str:
    """What nvidia-smi says, or why it says nothing."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    if done.returncode:
        return f"nvidia-smi: {(done.stdout + done.stderr).strip()[:300]}"
    words = [word.strip() for word in done.stdout.splitlines()[0].split(",")]
    return dict(zip(NVIDIA_SMI.split(","), words, strict=False)) | {"asked": time.strftime("%Y-%m-%d %H:%M:%S")}
