"""One rank's buffers: receive slots and state allocated once, inputs and outputs bound per call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import numpy_dtype
from ..errors import ArrayError
from ..schedule import Region, Schedule
from ..schedule.job import GIVEN, TAKEN
from ..transport import Bytes

Array = npt.NDArray[Any]


class Memory:
    """Slots by (buffer, slot). Slot 0 of what the caller gives and takes is the caller's own; all others are made here, once.

    `empty` makes a flat uint8 array where the backend's kernels can use it. With another memory `beside` it, of a schedule that
    never runs at the same time, slots of that are used where they are long enough.
    """

    def __init__(self, schedule: Schedule, rank: int, beside: Memory | None = None, *, empty: Callable[[int], Array]) -> None:
        self._slots: dict[tuple[str, int], Bytes] = {}
        self._bound: dict[tuple[str, int], Array] = {}
        self._lent: dict[tuple[str, int], Bytes] = {}
        pass_ = schedule.workload.pass_
        callers = {(name, 0) for name in GIVEN[pass_] + TAKEN[pass_]}
        for key, nbytes in schedule.buffers(rank).items():
            spare = None if beside is None else beside._slots.get(key)
            if key in callers:
                continue
            if spare is not None and spare.nbytes >= nbytes:
                self._lent[key] = spare
                continue
            self._slots[key] = empty(nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes allocated here."""
        return sum(slot.nbytes for slot in self._slots.values())

    def bind(self, **arrays: Array) -> None:
        """Use these arrays as slot 0 of their buffers."""
        for name, array in arrays.items():
            self._bound[name, 0] = array

    def release(self) -> None:
        """Forget the caller's arrays."""
        self._bound.clear()

    def array(self, region: Region) -> Array:
        """The region as an array of its dtype: of its shape, or a view of its box."""
        array = self._bound.get((region.buffer, region.slot))
        if array is None:
            flat = self._slot(region)[region.offset : region.array_end]
            array = flat.view(numpy_dtype(region.dtype)).reshape(region.shape)
        elif array.shape != region.shape:
            raise ArrayError(f"{region.buffer} has shape {array.shape}; the schedule expects {region.shape}")
        return array if region.box is None else array[tuple(slice(begin, end) for begin, end in region.box)]

    def bytes(self, region: Region) -> Bytes:
        """The region as flat bytes, for a transport."""
        bound = self._bound.get((region.buffer, region.slot))
        flat = self._slot(region) if bound is None else bound.reshape(-1).view(np.uint8)
        return flat[slice(*region.extent)]

    def _slot(self, region: Region) -> Bytes:
        key = region.buffer, region.slot
        return self._slots[key] if key in self._slots else self._lent[key]
