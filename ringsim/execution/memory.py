"""One rank's buffers: receive slots and state allocated once, inputs and outputs bound per call."""

from __future__ import annotations

from math import prod
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
        """The region as an array of its shape and dtype."""
        bound = self._bound.get((region.buffer, region.slot))
        if bound is not None:
            if bound.shape != region.shape:
                raise ArrayError(f"{region.buffer} has shape {bound.shape}; the schedule expects {region.shape}")
            return bound
        end = region.offset + prod(region.shape) * numpy_dtype(region.dtype).itemsize
        return self._slots[region.buffer, region.slot][region.offset : end].view(numpy_dtype(region.dtype)).reshape(region.shape)

    def bytes(self, region: Region) -> Bytes:
        """The region as flat bytes, for a transport."""
        bound = self._bound.get((region.buffer, region.slot))
        flat = self._slots[region.buffer, region.slot] if bound is None else bound.reshape(-1).view(np.uint8)
        return flat[region.offset : region.offset + region.nbytes]
