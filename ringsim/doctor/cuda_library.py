"""Run as a program: what CuPy, CUDA, NVRTC, cuDNN and NCCL say of themselves, as JSON. May crash or hang with the driver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import answers


def describe() -> dict[str, Any]:
    """Each fact, or under `failed` why it could not be had. Raises what importing CuPy raises."""
    import cupy

    runtime = cupy.cuda.runtime
    questions: dict[str, Callable[[], Any]] = {
        "runtime": runtime.runtimeGetVersion,
        "driver": runtime.driverGetVersion,
        "devices": lambda: [runtime.deviceGetPCIBusId(device) for device in range(runtime.getDeviceCount())],
        "peers": lambda: _peers(runtime),
        "nvrtc": _nvrtc,
        "headers": _headers,
        "nccl": _nccl,
        "cudnn_frontend": _frontend,
        "cudnn": _cudnn,
    }
    facts: dict[str, Any] = {"cupy": cupy.__version__, "failed": {}}
    for name, question in questions.items():
        try:
            facts[name] = question()
        except Exception as error:  # noqa: BLE001 - why it failed is the fact
            facts["failed"][name] = f"{type(error).__name__}: {error}"
    return facts


def _peers(runtime: Any) -> list[list[bool]]:
    every = range(runtime.getDeviceCount())
    return [[one == other or bool(runtime.deviceCanAccessPeer(one, other)) for other in every] for one in every]


def _nvrtc() -> str:
    from cupy.cuda import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def _headers() -> str:
    """Where CuPy looks for them too: without them it compiles no kernel, not even one that includes nothing."""
    from cuda.pathfinder import find_nvidia_header_directory

    found = find_nvidia_header_directory("cudart")
    if found is None:
        raise FileNotFoundError("CuPy finds neither nvidia-cuda-runtime nor a CUDA toolkit")
    return str(found)


def _nccl() -> int:
    from cupy.cuda import nccl

    if not nccl.available:
        raise ModuleNotFoundError("libnccl is not installed, or CuPy does not find it")
    return int(nccl.get_version())


def _frontend() -> str:
    import cudnn

    return str(cudnn.__version__)


def _cudnn() -> int:
    import cudnn

    return int(cudnn.backend_version())


if __name__ == "__main__":
    answers.tell(describe)
