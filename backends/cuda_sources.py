"""The CUDA sources of `backends/kernels`: their text, what they are compiled for, and how NVRTC compiles them.

A source's first line declares its macros, ``// takes: ELEMENT STATE``; in a Kernel's `types` each is a dtype's name, which
becomes a C type, or what the macro shall be.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import Final

from ringsim.backends.cuda import INSTALL, Kernel
from ringsim.errors import DeviceError, MissingDependency

C_TYPES: Final = {"float64": "double", "float32": "float", "float16": "half_t", "bfloat16": "bf16_t"}
MODULES: Final = ("cuda_state", "cuda_attend")
"""The modules whose KERNELS are all that is ever launched."""
_INCLUDE: Final = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)
_KERNEL: Final = re.compile(r'^extern "C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(', re.MULTILINE)


@cache
def text_of(source: str) -> str:
    """The text of a source, common.cuh first and each local include put in once, with ``#line`` to say what is whose.

    Raises DeviceError for a source that is not part of the installation.
    """
    return _expand("common.cuh", seen := set[str]()) + _expand(source, seen)


def _expand(name: str, seen: set[str]) -> str:
    if name in seen:
        return ""
    seen.add(name)
    path = files("ringsim.backends") / "kernels" / name
    if not path.is_file():
        raise DeviceError(f"backends/kernels/{name} is missing: install ringsim again, it belongs to the package")
    text = path.read_text().replace("#pragma once\n", "\n")
    pieces, line, end = [f'#line 1 "{name}"\n'], 1, 0
    for match in _INCLUDE.finditer(text):
        pieces.append(text[end : match.start()])
        line += text.count("\n", end, match.end())
        pieces.append(_expand(match[1], seen) + f'#line {line} "{name}"\n')
        end = match.end()
    return "".join((*pieces, text[end:]))


def macros_of(source: str) -> tuple[str, ...]:
    """The macros that a source declares on its first line."""
    first = (files("ringsim.backends") / "kernels" / source).read_text().partition("\n")[0]
    head, _, names = first.partition("takes:")
    if head.strip() != "//":
        raise DeviceError(f"backends/kernels/{source}: its first line should say `// takes:` and its macros, found {first!r}")
    return tuple(names.split())


def names_of(source: str) -> tuple[str, ...]:
    """The kernels that a source defines."""
    return tuple(_KERNEL.findall(text_of(source)))


def definitions(types: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """The compiler's options for a Kernel's types: ``-DELEMENT=bf16_t``."""
    return tuple(f"-D{macro}={C_TYPES.get(value, value)}" for macro, value in types)


def kernels() -> tuple[Kernel, ...]:
    """Every kernel in every variant that the backend can launch, and so what must compile."""
    return tuple(kernel for name in MODULES for kernel in import_module(f"ringsim.backends.{name}").KERNELS)


def compile_source(source: str, types: tuple[tuple[str, str], ...], arch: str) -> bytes:
    """The cubin of a source for an architecture such as ``sm_90``; it holds all of the source's kernels. Needs no GPU.

    Raises MissingDependency without CuPy, and DeviceError with the compiler's log if NVRTC refuses.
    """
    try:
        from cupy_backends.cuda.libs import nvrtc
    except ImportError as error:
        raise MissingDependency(f"compiling CUDA kernels needs CuPy ({error}): {INSTALL}") from error
    program = nvrtc.createProgram(text_of(source), source, (), ())
    try:
        nvrtc.compileProgram(program, ("-std=c++17", f"-arch={arch}", *definitions(types)))
        return bytes(nvrtc.getCUBIN(program))
    except (nvrtc.NVRTCError, RuntimeError) as error:
        log = nvrtc.getProgramLog(program)
        raise DeviceError(f"NVRTC: {source} with {dict(types)} for {arch}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)
