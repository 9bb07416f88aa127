"""Partial outputs of tiles that wait to be folded into their state, several in one pass over memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ringsim.backends.cuda import Calls, DeviceArray, Stream
from ringsim.backends.cuda_state import MOST_PARTIALS, Partial, StateKernels
from ringsim.dtypes import ITEMSIZE, numpy_dtype
from ringsim.errors import DeviceError
from ringsim.lowering import ALIGNMENT, MOST_PENDING
from ringsim.schedule.ops import Compute, Region

State = tuple[DeviceArray, DeviceArray, DeviceArray]
Places = tuple[Region, ...]


class Scratch:
    """Device memory for what comes and goes on one stream: given back as soon as its last use is queued, and kept for good."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._free: list[DeviceArray] = []
        self.nbytes = 0

    def take(self, nbytes: int) -> DeviceArray:
        """The smallest free piece that is large enough, or a new one."""
        fitting = [one for one in self._free if one.nbytes >= nbytes]
        if not fitting:
            self.nbytes += nbytes
            return self._calls.empty(nbytes)
        best = min(fitting, key=lambda one: int(one.nbytes))
        self._free = [one for one in self._free if one is not best]
        return best

    def give_back(self, piece: DeviceArray) -> None:
        """What is queued from now on may overwrite it."""
        self._free.append(piece)


@dataclass(slots=True)
class Pending:
    """One state and the partial outputs that it lacks; `fresh` if its memory holds nothing yet."""

    places: Places
    state: State
    fresh: bool
    partials: list[Partial] = field(default_factory=list)
    pieces: list[DeviceArray] = field(default_factory=list)
    nbytes: int = 0

    def meets(self, region: Region) -> bool:
        """Whether the region is a part of the state."""
        return any(place.overlaps(region) for place in self.places)


class Ledger:
    """The states of a run that lack something. A state is brought up to date before anything but `attend` uses it.

    A row's partials are merged in the order of its tiles' launches, so equal schedules give equal bits.
    """

    def __init__(self, calls: Calls, kernels: StateKernels) -> None:
        self._kernels = kernels
        self._open: list[Pending] = []
        self.scratch = Scratch(calls)

    def begin(self) -> None:
        """A run begins: what an earlier one left is of no use."""
        while self._open:
            self._close(self._open[-1])

    def reset(self, places: Places, state: State) -> None:
        """The state has seen no key: nothing need be written yet."""
        self._open.append(Pending(places, state, fresh=True))

    def of(self, places: Places, state: State) -> Pending:
        """The entry of this state."""
        found = next((one for one in self._open if _same(one.places, places)), None)
        if found is None:
            found = Pending(places, state, fresh=False)
            self._open.append(found)
        return found

    def room(self, pending: Pending, shape: tuple[int, ...], dtype: str, stream: Stream) -> tuple[DeviceArray, DeviceArray]:
        """Scratch for a partial: out (batch, rows, heads, v_head_dim) in `dtype`, and lse (batch, heads, rows)."""
        batch, rows, heads, width = shape
        sizes = [batch * rows * heads * width * ITEMSIZE[dtype], batch * rows * heads * pending.state[1].dtype.itemsize]
        first = -(-sizes[0] // ALIGNMENT) * ALIGNMENT
        acc = pending.state[0]
        full = acc.size * ITEMSIZE[dtype]
        if pending.partials and (len(pending.partials) == MOST_PARTIALS or pending.nbytes + sizes[0] > MOST_PENDING * full):
            self.fold(pending, stream)
        piece = self.scratch.take(first + sizes[1])
        pending.pieces.append(piece)
        pending.nbytes += sizes[0]
        out = piece[: sizes[0]].view(numpy_dtype(dtype)).reshape(batch, rows, heads, width)
        lse = piece[first : first + sizes[1]].view(pending.state[1].dtype).reshape(batch, heads, rows)
        return out, lse

    def fold(self, pending: Pending, stream: Stream) -> None:
        """Bring the state up to date."""
        if pending.fresh or pending.partials:
            self._kernels.merge_partials(pending.state, pending.fresh, pending.partials, stream)
        pending.fresh = False
        self._empty(pending)

    def finish(self, pending: Pending, out: DeviceArray, lse: DeviceArray, stream: Stream) -> None:
        """Write out and lse of the state, which is not written itself and is of no more use."""
        self._kernels.finish_partials(pending.state, pending.fresh, pending.partials, out, lse, stream)
        self._close(pending)

    def meeting(self, regions: tuple[Region, ...], but: Places = ()) -> Iterator[Pending]:
        """The entries of which some region is a part, but for that of the state at `but`; each is removed after its turn."""
        for pending in tuple(self._open):
            if not (but and _same(pending.places, but)) and any(pending.meets(region) for region in regions):
                yield pending
                self._close(pending)

    def _empty(self, pending: Pending) -> None:
        for piece in pending.pieces:
            self.scratch.give_back(piece)
        pending.partials.clear()
        pending.pieces.clear()
        pending.nbytes = 0

    def _close(self, pending: Pending) -> None:
        self._empty(pending)
        self._open = [one for one in self._open if one is not pending]


def _same(one: Places, other: Places) -> bool:
    """Whether both are the same bytes, whatever value and version they hold."""
    return all(
        (a.buffer, a.slot, a.shape, a.offset, a.box) == (b.buffer, b.slot, b.shape, b.offset, b.box)
        for a, b in zip(one, other, strict=True)
    )


def places_of(op: Compute) -> Places:
    """The regions of a state that reset, attend and finish work on: acc, max and sum."""
    found = op.reads if op.kernel == "finish" else op.writes
    if len(found) != 3:
        raise DeviceError(f"op {op.id} ({op.kernel}) works on a state of {len(found)} regions; acc, max and sum are three")
    return found
