"""One rank's buffers: receive slots and state allocated once, inputs and outputs bound per call."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import numpy_dtype
from ..errors import ArrayError
from ..schedule import Region, Schedule
from ..transport import Bytes

Array = npt.NDArray[Any]
BOUND = ("q", "k", "v", "out")


class Memory:
    """Slots by (buffer, slot). Slot 0 of q, k, v and out is the caller's own array; all others are made here, once."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self._slots: dict[tuple[str, int], Bytes] = {}
        self._bound: dict[tuple[str, int], Array] = {}
        for key, nbytes in schedule.buffers(rank).items():
            if key[0] not in BOUND or key[1] != 0:
                self._slots[key] = np.empty(nbytes, dtype=np.uint8)
                # touch every page now, so that the first run does not pay for it
                self._slots[key].fill(0)

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
            flat = self._slots[region.buffer, region.slot][region.offset : region.array_end]
            array = flat.view(numpy_dtype(region.dtype)).reshape(region.shape)
        elif array.shape != region.shape:
            raise ArrayError(f"{region.buffer} has shape {array.shape}; the schedule expects {region.shape}")
        return array if region.box is None else array[tuple(slice(begin, end) for begin, end in region.box)]

    def bytes(self, region: Region) -> Bytes:
        """The region as flat bytes, for a transport."""
        bound = self._bound.get((region.buffer, region.slot))
        flat = self._slots[region.buffer, region.slot] if bound is None else bound.reshape(-1).view(np.uint8)
        return flat[slice(*region.extent)]
