"""Arrays in: anything with `__dlpack__` or the buffer protocol becomes a NumPy array, without a copy where that can be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import combinations
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from .dtypes import ATTENTION
from .errors import ArrayError

Array = npt.NDArray[Any]
View = Callable[[str, Any], Array]
"""How a backend sees an argument, by its name and value, as an array that shares its memory. Raises ArrayError."""
MOST_WORK: Final = 10_000
"""Candidates to try when arrays are looked at for a common byte."""
CUDA_KINDS: Final = (2, 13)
"""Of DLPack: device memory, and managed memory."""
SHAPES: Final = "(batch, seq, heads, head_dim), or (tokens, heads, head_dim) for one sequence"


def as_array(name: str, value: Any, view: View) -> Array:
    """`value` as an array of 3 or 4 dimensions that shares its memory. Raises ArrayError naming the argument."""
    array = view(name, value)
    if array.ndim not in (3, 4):
        raise ArrayError(f"{name} has {array.ndim} dimensions {array.shape}; expected {SHAPES}")
    if not array.dtype.isnative:
        raise ArrayError(f"{name} has dtype {array.dtype.str}, not in this machine's byte order")
    if array.dtype.name not in ATTENTION:
        raise ArrayError(f"{name} has dtype {array.dtype.name}; allowed: {', '.join(ATTENTION)}")
    return array


def as_operands(q: Any, k: Any, v: Any, view: View) -> tuple[list[Array], bool]:
    """q, k and v as 4-D arrays that share their memory, and whether they came packed: 3-D, without the axis of sequences.

    Raises ArrayError.
    """
    arrays = [as_array(name, value, view) for name, value in (("q", q), ("k", k), ("v", v))]
    if len({array.ndim for array in arrays}) > 1:
        found = ", ".join(f"{name} has {array.ndim} dimensions" for name, array in zip("qkv", arrays, strict=True))
        raise ArrayError(f"{found}; all must be {SHAPES}")
    packed = arrays[0].ndim == 3
    return [array[None] for array in arrays] if packed else arrays, packed


def as_inputs(given: dict[str, Any], view: View) -> tuple[list[Array], bool]:
    """As `as_operands`, of arrays by name: q, k, v and, of the backward pass, out, lse and dout. Raises ArrayError."""
    operands, packed = as_operands(given["q"], given["k"], given["v"], view)
    found = dict(zip("qkv", operands, strict=True))
    for name, value in given.items():
        if name in found:
            continue
        array = view(name, value) if name == "lse" else as_array(name, value, view)
        wanted = (4 if name != "lse" else 3) - packed
        if array.ndim != wanted:
            raise ArrayError(f"{name} has {array.ndim} dimensions {array.shape}; expected {wanted}, as q has {4 - packed}")
        found[name] = array[None] if packed else array
    return [found[name] for name in given], packed


def host_view(name: str, value: Any) -> Array:
    """`value` as a NumPy array of any rank and dtype that shares its memory. Raises ArrayError."""
    if isinstance(value, np.ndarray):
        return value
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _from_torch(name, value, torch)
    if hasattr(value, "__dlpack__"):
        device_kind = getattr(value, "__dlpack_device__", lambda: (1, 0))()[0]
        if device_kind != 1:
            raise ArrayError(
                f"{name} lies on a device (DLPack kind {int(device_kind)}); backend 'numpy' needs host memory, 'cupy' takes such"
            )
        try:
            return np.from_dlpack(value)
        except (RuntimeError, TypeError, BufferError, ValueError):
            return np.asarray(value)
    try:
        return np.asarray(memoryview(value))
    except TypeError:
        raise ArrayError(f"{name} is {type(value).__name__}: it has neither __dlpack__ nor the buffer protocol") from None


def _from_torch(name: str, tensor: Any, torch: Any) -> Array:
    """NumPy has no DLPack bfloat16, so such a tensor crosses as 16-bit integers."""
    if tensor.requires_grad:
        raise ArrayError(f"{name} is a torch tensor that requires grad; pass {name}.detach()")
    if tensor.device.type != "cpu":
        raise ArrayError(f"{name} lies on {tensor.device}; backend 'numpy' needs host memory")
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        bits: Array = np.from_dlpack(tensor.view(torch.int16))
        return bits.view(ml_dtypes.bfloat16)
    array: Array = np.from_dlpack(tensor)
    return array


def writable(name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any], view: View) -> Array:
    """An output argument as an array to write into. Raises ArrayError if shape or dtype do not fit or it is read-only."""
    array = view(name, value)
    if array.shape != shape or array.dtype != dtype:
        raise ArrayError(f"{name} is {array.dtype.name}{array.shape}; expected {dtype.name}{shape}")
    # memory of a device is always writable
    if not getattr(array.flags, "writeable", True):
        array = _unlock(name, value, array)
    return array


def _unlock(name: str, value: Any, array: Array) -> Array:
    """np.from_dlpack marks some views read-only although the owner is writable: ask the buffer protocol instead."""
    if hasattr(value, "__array__") and not isinstance(value, np.ndarray):
        again = np.asarray(value)
        if again.flags.writeable and again.__array_interface__["data"][0] == array.__array_interface__["data"][0]:
            return again
    raise ArrayError(f"{name} is read-only")


def on_device(value: Any) -> bool:
    """Whether an argument says that it lies in the memory of a CUDA device."""
    if hasattr(value, "__cuda_array_interface__"):
        return True
    kind = getattr(value, "__dlpack_device__", None)
    return kind is not None and int(kind()[0]) in CUDA_KINDS


def share_memory(one: Array, other: Array) -> bool:
    """Whether two arrays have a byte in common; also where that is too hard to tell. Slices of one packed array have none.

    Of arrays of a device only addresses are looked at.
    """
    try:
        found: bool = cast("Any", np.shares_memory)(_shadow(one), _shadow(other), max_work=MOST_WORK)
    except np.exceptions.TooHardError:
        return True
    return found


class _Place:
    """Where an array lies, in NumPy's terms; nothing there is touched."""

    def __init__(self, array: Any) -> None:
        address = array.data.ptr if hasattr(array.data, "ptr") else array.ctypes.data
        bits = {"shape": array.shape, "strides": array.strides, "data": (int(address), False), "version": 3}
        self.__array_interface__ = bits | {"typestr": f"|V{array.dtype.itemsize}"}


def _shadow(array: Any) -> Array:
    if not array.size:
        return np.empty(0, np.uint8)
    return array if type(array) is np.ndarray else np.asarray(_Place(array))


def check_apart(given: dict[str, Array], taken: dict[str, Array]) -> None:
    """Raise ArrayError where an output lies where an input does that is still needed when it is written."""
    for output, target in taken.items():
        for name, source in given.items():
            # a row of out is written when its query has been used for the last time, but for gradients
            over = (output, name) == ("out", "q") and "dout" not in given
            if not over and share_memory(source, target):
                raise ArrayError(f"{output} shares memory with {name}, which may still be on its way when {output} is written")
    for (one, target), (other, second) in combinations(taken.items(), 2):
        if share_memory(target, second):
            raise ArrayError(f"{other} shares memory with {one}: one would be written over the other")
