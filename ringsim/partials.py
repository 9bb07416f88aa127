"""What tiles of fused kernels make, until it is folded into a state or a sum: when, and in how much memory.

A GPU backend keeps the partial outputs of several tiles and folds them into their state in one pass over memory. It asks this
ledger when; the memory model asks the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, Final, Generic, NamedTuple, TypeVar

from .dtypes import ITEMSIZE, accumulator
from .errors import DeviceError
from .parts import parts_of
from .schedule import Compute, Op, Region
from .schedule.schedule import regions
from .tile import Tile
from .workload import Workload

MOST_PENDING: Final = 4
"""Partial outputs, in whole outputs, that wait at most: a pass over a state costs as much as four of bfloat16, and memory."""
MOST_PARTIALS: Final = 8
"""Partial outputs that one pass folds in at most: `backends/kernels/partials.cuh` has as many slots."""
ALIGNMENT: Final = 256
"""Bytes to which what shares a piece of memory is aligned."""
OWN_STATE: Final = ("reset", "attend", "finish")
"""Kernels that know of partial outputs which wait."""
Places = tuple[Region, ...]
"""The regions of a state: acc, max and sum."""
Memory = TypeVar("Memory")


class Piece(NamedTuple, Generic[Memory]):
    """Some memory of a pool."""

    nbytes: int
    memory: Memory


class Pool(Generic[Memory]):
    """Pieces of memory that come and go and are kept for good: the smallest free one that is large enough, or a new one."""

    def __init__(self, make: Callable[[int], Memory]) -> None:
        self._make = make
        self._free: list[Piece[Memory]] = []
        self.nbytes = 0
        """Bytes of all pieces made so far."""

    def take(self, nbytes: int) -> Piece[Memory]:
        """A piece of at least so many bytes."""
        fitting = [index for index, piece in enumerate(self._free) if piece.nbytes >= nbytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda index: self._free[index].nbytes))
        self.nbytes += nbytes
        return Piece(nbytes, self._make(nbytes))

    def give_back(self, pieces: Iterable[Piece[Memory]]) -> None:
        """What is taken from now on may be these."""
        self._free += pieces


@dataclass(slots=True)
class Pending(Generic[Memory]):
    """One state, and the partial outputs that it lacks, as the backend keeps them; `fresh` if its memory holds nothing yet."""

    places: Places
    state: Any
    fresh: bool
    partials: list[Any] = field(default_factory=list)
    pieces: list[Piece[Memory]] = field(default_factory=list)
    nbytes: int = 0

    def meets(self, touched: Iterable[Region]) -> bool:
        """Whether one of the regions is a part of the state."""
        return any(place.overlaps(region) for place in self.places for region in touched)


class Ledger(Generic[Memory]):
    """The states of a run that lack something. A state is brought up to date before anything but `attend` uses it.

    The partials of a state are folded in in the order of their tiles, so equal schedules give equal bits.
    """

    def __init__(self, make: Callable[[int], Memory]) -> None:
        self.pool = Pool(make)
        self._open: list[Pending[Memory]] = []

    def begin(self) -> None:
        """A run begins: what an earlier one left is of no use."""
        for pending in tuple(self._open):
            self.close(pending)

    def interrupted(self, touched: tuple[Region, ...], own: Places | None = None) -> Iterator[Pending[Memory]]:
        """The entries that an op which touches these regions must find up to date, but for that of its `own` state.

        Each is removed after its turn.
        """
        for pending in tuple(self._open):
            if not (own and _same(pending.places, own)) and pending.meets(touched):
                yield pending
                self.close(pending)

    def reset(self, places: Places, state: Any = None) -> None:
        """The state has seen no key: nothing need be written yet."""
        found = self._find(places)
        if found is not None:
            self.close(found)
        self._open.append(Pending(places, state, fresh=True))

    def of(self, places: Places, state: Any = None) -> Pending[Memory]:
        """The entry of this state."""
        found = self._find(places)
        if found is None:
            found = Pending(places, state, fresh=False)
            self._open.append(found)
        return found

    def _find(self, places: Places) -> Pending[Memory] | None:
        return next((one for one in self._open if _same(one.places, places)), None)

    def full(self, pending: Pending[Memory], nbytes: int, itemsize: int) -> bool:
        """Whether what waits must be folded in before a partial output of `nbytes` comes; its elements have `itemsize` bytes."""
        most = MOST_PENDING * prod(pending.places[0].sizes) * itemsize
        return bool(pending.partials) and (len(pending.partials) == MOST_PARTIALS or pending.nbytes + nbytes > most)

    def room(self, pending: Pending[Memory], nbytes: int, beside: int) -> Memory:
        """Memory for a partial output of `nbytes` and, after it and aligned, for `beside` bytes of lse."""
        piece = self.pool.take(aligned(nbytes) + beside)
        pending.pieces.append(piece)
        pending.nbytes += nbytes
        return piece.memory

    def empty(self, pending: Pending[Memory]) -> None:
        """All that waited has been folded in."""
        self.pool.give_back(pending.pieces)
        pending.pieces.clear()
        pending.partials.clear()
        pending.nbytes = 0
        pending.fresh = False

    def close(self, pending: Pending[Memory]) -> None:
        """The state lacks nothing that is of use."""
        self.empty(pending)
        self._open = [one for one in self._open if one is not pending]


def aligned(nbytes: int) -> int:
    """Bytes up to the next boundary at which something else may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def places_of(op: Compute) -> Places:
    """The regions of the state that reset, attend and finish work on: acc, max and sum. Raises DeviceError."""
    found = op.reads if op.kernel == "finish" else op.writes
    if len(found) != 3:
        raise DeviceError(f"op {op.id} ({op.kernel}) works on a state of {len(found)} regions; acc, max and sum are three")
    return found


def _same(one: Places, other: Places) -> bool:
    """Whether both are the same bytes, whatever value and version they hold."""
    return all(
        (a.buffer, a.slot, a.shape, a.offset, a.box) == (b.buffer, b.slot, b.shape, b.offset, b.box)
        for a, b in zip(one, other, strict=True)
    )


def head_ranges(tile: Tile, group: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """A tile's query heads with their key/value heads, so cut that each range has all query heads of its key/value heads, or
    some of one alone.
    """
    begin, end = tile.heads
    while begin < end:
        whole = (end - begin) // group * group if begin % group == 0 else 0
        stop = begin + whole if whole else min(end, (begin // group + 1) * group)
        yield (begin, stop), (begin // group, -(-stop // group))
        begin = stop


def partials_nbytes(program: Iterable[Op], workload: Workload, partial: str) -> int:
    """Bytes that a run of a rank's program takes for what its tiles make, in dtype `partial`: the backend's ledger, kept dry."""
    ledger: Ledger[None] = Ledger(lambda nbytes: None)
    for op in program:
        own = places_of(op) if isinstance(op, Compute) and op.kernel in OWN_STATE else None
        for _ in ledger.interrupted(regions(op), own):
            pass
        if not isinstance(op, Compute):
            continue
        if op.kernel == "attend_backward":
            _take_gradients(ledger.pool, op, workload, ITEMSIZE[partial])
        elif op.kernel == "reset" and own is not None:
            ledger.reset(own)
        elif op.kernel == "finish" and own is not None:
            ledger.close(ledger.of(own))
        elif own is not None:
            _take_partials(ledger, ledger.of(own), op, workload, ITEMSIZE[partial])
    return ledger.pool.nbytes


def _take_partials(ledger: Ledger[None], pending: Pending[None], op: Compute, workload: Workload, itemsize: int) -> None:
    group = workload.heads // workload.kv_heads
    for tile, part in parts_of(op.tiles):
        for (first, last), _ in head_ranges(tile, group):
            rows = (tile.batch[1] - tile.batch[0]) * (part.q_rows[1] - part.q_rows[0]) * (last - first)
            nbytes = rows * workload.v_head_dim * itemsize
            if ledger.full(pending, nbytes, itemsize):
                ledger.empty(pending)
            ledger.room(pending, nbytes, rows * ITEMSIZE[accumulator(workload.dtype)])
            pending.partials.append(None)


def _take_gradients(pool: Pool[None], op: Compute, workload: Workload, itemsize: int) -> None:
    group = workload.heads // workload.kv_heads
    for tile, part in parts_of(op.tiles):
        sequences = (tile.batch[1] - tile.batch[0]) * itemsize
        q_rows, k_rows = (end - begin for begin, end in (part.q_rows, part.k_rows))
        for (first, last), (kv_first, kv_last) in head_ranges(tile, group):
            keys = sequences * k_rows * (kv_last - kv_first)
            sizes = (
                sequences * q_rows * (last - first) * workload.head_dim,
                keys * workload.head_dim,
                keys * workload.v_head_dim,
            )
            pool.give_back([pool.take(size) for size in sizes])
