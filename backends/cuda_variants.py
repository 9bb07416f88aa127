"""The variants that the kernels over state, sums and gradients are compiled in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from ringsim.backends.cuda import Kernel
from ringsim.backends.cuda_strides import WIDEST
from ringsim.dtypes import ITEMSIZE
from ringsim.errors import ArrayError

Types = tuple[tuple[str, str], ...]
_MERGED: Final = [("float64", "float64"), *(("float32", partial) for partial in ("float32", "float16", "bfloat16"))]
_FINISHED: Final = [
    *((state, partial, state) for state, partial in _MERGED),
    *(("float32", partial, half) for half in ("float16", "bfloat16") for partial in ("float32", half)),
]
_CAST: Final = [("float16", "float32"), ("bfloat16", "float32")]
UNITS: Final = (16, 8, 4, 2, 1)


def columns_of(target: str, source: str) -> tuple[int, int]:
    """Elements that `sums.cu` and `casts.cu` take at once: as many as make 16 bytes of the smaller dtype, or one."""
    return WIDEST // min(ITEMSIZE[target], ITEMSIZE[source]), 1


def _pairs(source: str, name: str, pairs: Sequence[tuple[str, str]]) -> Iterator[Kernel]:
    for pair in pairs:
        for columns in columns_of(*pair):
            yield Kernel(source=source, name=name, types=pair_types(*pair, columns))


def pair_types(target: str, source: str, columns: int) -> Types:
    """The types of `sums.cu` and `casts.cu`."""
    return ("TARGET", target), ("SOURCE", source), ("COLUMNS", str(columns))


def merge_types(state: str, partial: str) -> Types:
    """The types of `partials.cu`."""
    return ("STATE", state), ("PARTIAL", partial)


def delta_types(state: str, element: str) -> Types:
    """The types of `delta.cu`."""
    return ("STATE", state), ("ELEMENT", element)


KERNELS: Final = (
    *(Kernel(source="partials.cu", name="merge_partials", types=merge_types(*types)) for types in _MERGED),
    *(
        Kernel(source="finish.cu", name="finish_partials", types=(*merge_types(state, partial), ("RESULT", result)))
        for state, partial, result in _FINISHED
    ),
    *(Kernel(source="state.cu", name="merge", types=(("STATE", state),)) for state in ("float64", "float32")),
    *(Kernel(source="copies.cu", name=name, types=(("UNIT", str(unit)),)) for unit in UNITS for name in ("copy", "clear")),
    *_pairs("sums.cu", "accumulate", _MERGED),
    *_pairs("casts.cu", "cast", _CAST),
    *(Kernel(source="delta.cu", name="delta", types=delta_types(*types)) for types in _MERGED),
    *(Kernel(source="stand_in.cu", name="stand_in", types=(("ELEMENT", half),)) for half in ("float16", "bfloat16")),
)
"""Every kernel of this module in every variant."""
_KNOWN: Final = {(kernel.name, kernel.types): kernel for kernel in KERNELS}


def variant(name: str, types: Types) -> Kernel:
    """The kernel compiled for these types. Raises ArrayError if none is."""
    kernel = _KNOWN.get((name, types))
    if kernel is None:
        known = "; ".join(str(dict(each.types)) for each in KERNELS if each.name == name)
        raise ArrayError(f"{name}: no kernel is compiled for {dict(types)}; compiled for: {known}")
    return kernel
