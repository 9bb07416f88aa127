"""Rings of different sizes in one job: long documents on many ranks, short ones on few or on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, inf
from typing import Any, Final

import numpy as np

from .errors import RankMismatch, WorkloadError
from .mask.numbers import count_of
from .partition import runs_text
from .tile import IntArray
from .units import shown

TARGETS: Final = (1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0)
"""Work per rank, over the mean, above which a document gets another rank: these plans are compared."""
SLACK: Final = 0.05
AT_ONCE: Final = 2**18
"""Runs whose tokens are summed together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """`size` ranks from `first` on. `documents`, by index, are split over all of them; those of ``alone[i]`` are whole on rank
    ``first + i`` (none in a ring of one: all are its `documents`).
    """

    first: int
    size: int
    documents: tuple[int, ...]
    alone: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A rank's place: its ring, the documents that it has to itself, and a communicator of the ring's ranks, which the caller
    frees.
    """

    comm: Any
    ring: Ring
    alone: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RingSizes:
    """A plan: rings that share no rank and use every one; each document on one of them, or whole on one rank of it.

    A document is split over its ring's ranks by `kind` (zigzag if causal, else contiguous).
    """

    lengths: tuple[int, ...]
    world_size: int
    causal: bool
    rings: tuple[Ring, ...]
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", "zigzag" if self.causal else "contiguous")

    @cached_property
    def partition(self) -> str:
        """``runs(...)`` of the documents one after another: for one packed run under ``Causal() & Documents(lengths)``."""
        places = {document: (first, size) for document, first, size in self._places()}
        return runs_text(run for document in range(len(self.lengths)) for run in self._runs(document, *places[document]))

    @cached_property
    def work(self) -> tuple[int, ...]:
        """Visible (query, key) pairs of each rank."""
        return self._sums(lambda begins, lengths: begins * (begins + 1) // 2 if self.causal else begins * lengths)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return self._sums(lambda begins, _: begins)

    @property
    def moved_tokens(self) -> int:
        """Tokens whose keys and values move one hop, over all documents: (size - 1) for each token."""
        return sum((size - 1) * self.lengths[document] for document, _, size in self._places())

    def split(self, comm: Any) -> Seat:
        """This rank's ring as a communicator, by ``comm.Split`` of an mpi4py communicator; collective. Raises RankMismatch."""
        if comm.Get_size() != self.world_size:
            raise RankMismatch(f"the rings are for {self.world_size} ranks, the communicator has {comm.Get_size()}")
        rank = comm.Get_rank()
        ring = next(ring for ring in self.rings if ring.first <= rank < ring.first + ring.size)
        alone = ring.alone[rank - ring.first] if ring.alone else ()
        return Seat(comm=comm.Split(ring.first, rank), ring=ring, alone=alone)

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """(document, first rank, ranks that share it)."""
        for first, size, documents in self._held():
            yield from ((document, first, size) for document in documents)

    def _sums(self, before: Callable[[IntArray, IntArray], IntArray]) -> tuple[int, ...]:
        """The sum of each rank over all that it holds; `before` gives that of the tokens before a place of a document."""
        exact = sum(length * (length + 1) for length in self.lengths) < 2**62
        lengths = np.array(self.lengths, dtype=np.int64 if exact else object)
        sums = [0] * self.world_size
        for first, size, documents in self._held():
            several = max(1, AT_ONCE // (2 * size + 1))
            for begin in range(0, len(documents), several):
                some = lengths[list(documents[begin : begin + several])][:, None]
                runs = np.diff(before(_begins(some, 2 * size if self.causal else size), some).sum(axis=0))
                mine = runs[:size] + runs[: size - 1 : -1] if self.causal else runs
                for place, value in enumerate(mine.tolist()):
                    sums[first + place] += value
        return tuple(sums)

    def _held(self) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """(first rank, ranks that share them, documents)."""
        for ring in self.rings:
            yield ring.first, ring.size, ring.documents
            yield from ((ring.first + place, 1, documents) for place, documents in enumerate(ring.alone))

    def _runs(self, document: int, first: int, size: int) -> tuple[tuple[int, int], ...]:
        """(rank, tokens) in the order of the document."""
        return tuple((first + owner, count) for owner, count in _cut(self.lengths[document], size, self.causal))


def _cut(length: int, size: int, causal: bool) -> tuple[tuple[int, int], ...]:
    """(rank of the ring, tokens): the runs of Partition zigzag, or contiguous, in the order of the document."""
    owners = (*range(size), *reversed(range(size))) if causal else tuple(range(size))
    share, longer = divmod(length, len(owners))
    return tuple((owner, share + (index < longer)) for index, owner in enumerate(owners))


def _begins(lengths: IntArray, parts: int) -> IntArray:
    """Where the `parts` runs of documents begin, and where the last ends; a row for each document."""
    index = np.arange(parts + 1)
    return index * (lengths // parts) + np.minimum(index, lengths % parts)


def size_rings(
    lengths: Sequence[int], world_size: int, *, causal: bool = True, most_tokens: int | None = None, slack: float = SLACK
) -> RingSizes:
    """Rings for documents of these lengths in tokens, so that all ranks have about as much work and few tokens move.

    Work is visible pairs. For each of some targets (TARGETS times the mean work of a rank), a document gets work / target ranks,
    rounded up, the heaviest first; one that needs a single rank goes to the least laden, or, beyond the target, to a ring. Of
    these plans, and one ring of all ranks, it is the one that moves fewest tokens among those whose largest work is within
    ``1 + slack`` of the least. `most_tokens` bounds the tokens of a rank. Raises WorkloadError. The problem is that of FlexSP
    (arXiv 2412.01523) and ByteScale (arXiv 2502.21231), solved here without a model of the machine: simulate the result.
    """
    lengths = _lengths_of(lengths)
    world_size = count_of("world_size", world_size, least=1)
    most_tokens = None if most_tokens is None else count_of("most_tokens", most_tokens)
    _check(lengths, world_size, most_tokens, slack)
    work = [_pairs(length, causal) for length in lengths]
    targets = [factor * sum(work) / world_size for factor in TARGETS]
    drafts = (_Draft(lengths, work, world_size, most_tokens, target).fill() for target in (*targets, 0.0))
    made = [
        RingSizes(lengths=lengths, world_size=world_size, causal=causal, rings=rings) for rings in drafts if rings is not None
    ]
    plans = [plan for plan in made if most_tokens is None or max(plan.tokens) <= most_tokens]
    if not plans:
        raise WorkloadError(
            f"documents of {sum(lengths)} tokens do not fit on {world_size} ranks of at most {most_tokens} in any way that was "
            "tried: raise most_tokens, take more ranks, or leave documents out"
        )
    least = min(max(plan.work) for plan in plans)
    limit = max(least, (1 + slack) * least)
    return min((plan for plan in plans if max(plan.work) <= limit), key=lambda plan: (plan.moved_tokens, max(plan.work)))


def _lengths_of(values: Any) -> tuple[int, ...]:
    try:
        found = tuple(values)
    except TypeError:
        raise WorkloadError(f"lengths are {shown(values)}; they must be a sequence of whole numbers") from None
    return tuple(count_of(f"lengths[{index}]", value) for index, value in enumerate(found))


def _check(lengths: tuple[int, ...], world_size: int, most_tokens: int | None, slack: Any) -> None:
    if isinstance(slack, bool) or not isinstance(slack, int | float) or not 0 <= slack < inf:
        raise WorkloadError(f"slack is {shown(slack)}; it must be a number >= 0, such as {SLACK}")
    if most_tokens is not None and sum(lengths) > most_tokens * world_size:
        raise WorkloadError(
            f"documents of {sum(lengths)} tokens do not fit on {world_size} ranks of at most {most_tokens}: "
            f"take {-(-sum(lengths) // max(most_tokens, 1))} ranks or raise most_tokens to {-(-sum(lengths) // world_size)}"
        )


def _pairs(length: int, causal: bool) -> int:
    """Visible pairs of a document."""
    return length * (length + 1) // 2 if causal else length * length


class _Draft:
    """Rings being made for a target of work per rank (0: one ring of all)."""

    def __init__(
        self, lengths: Sequence[int], work: Sequence[int], world_size: int, most_tokens: int | None, target: float
    ) -> None:
        self.lengths = lengths
        self.work = work
        self.world_size = world_size
        self.most_tokens = most_tokens
        self.target = target
        self.loads = np.zeros(world_size)
        self.tokens = np.zeros(world_size, dtype=np.int64)
        self.alone: list[list[int]] = [[] for _ in range(world_size)]
        self.rings: list[tuple[range, list[int]]] = []
        self.used = 0
        # of each ring: its ranks, and the most that one of them has
        self.sizes = np.ones(world_size, dtype=np.int64)
        self.ring_loads = np.zeros(world_size)
        self.ring_tokens = np.zeros(world_size, dtype=np.int64)
        self.ring_of: list[int | None] = [None] * world_size

    def fill(self) -> tuple[Ring, ...] | None:
        """The rings; None if a document has no place."""
        for document in sorted(range(len(self.lengths)), key=lambda document: (-self.work[document], document)):
            size = self._wanted(document)
            if 1 < size <= self.world_size - self.used:
                self._open(size)
            load, rank = self._rank(document) if size == 1 else (inf, 0)
            # a document that one rank can take within the target moves nothing there
            if load > self.target:
                shared, ring = self._ring(document)
                if load == shared == inf:
                    return None
                if shared < load:
                    self._share(document, ring)
                    continue
            self._give(document, rank)
        return self._placed()

    def _wanted(self, document: int) -> int:
        """Ranks for a document, by work and by memory."""
        by_work = ceil(self.work[document] / self.target) if self.target else self.world_size
        by_memory = -(-self.lengths[document] // self.most_tokens) if self.most_tokens else 1
        return min(self.world_size, max(1, by_work, by_memory))

    def _open(self, size: int) -> None:
        """A ring of the next ranks: these have nothing yet, as the documents that need several come first."""
        ranks = range(self.used, self.used + size)
        self.ring_of[ranks.start : ranks.stop] = [len(self.rings)] * size
        self.sizes[len(self.rings)] = size
        self.rings.append((ranks, []))
        self.used += size

    def _rank(self, document: int) -> tuple[float, int]:
        """The work of the rank that has least with the document, and which; inf if no rank has room for its tokens."""
        loads = self.loads + float(self.work[document])
        if self.most_tokens is not None:
            loads[self.tokens + self.lengths[document] > self.most_tokens] = inf
        rank = int(loads.argmin())
        return float(loads[rank]), rank

    def _ring(self, document: int) -> tuple[float, int]:
        """As `_rank`, of the most laden rank of a ring with its part of the document; of equal ones the smallest, first ring."""
        count = len(self.rings)
        if not count:
            return inf, 0
        sizes = self.sizes[:count]
        loads = self.ring_loads[:count] + float(self.work[document]) / sizes
        if self.most_tokens is not None:
            loads[self.ring_tokens[:count] + -(-self.lengths[document] // sizes) > self.most_tokens] = inf
        least = loads.min()
        ring = min(np.flatnonzero(loads == least).tolist(), key=lambda index: (sizes[index], index))
        return float(least), ring

    def _give(self, document: int, rank: int) -> None:
        self.loads[rank] += self.work[document]
        self.tokens[rank] += self.lengths[document]
        self.alone[rank].append(document)
        ring = self.ring_of[rank]
        if ring is not None:
            self.ring_loads[ring] = max(self.ring_loads[ring], self.loads[rank])
            self.ring_tokens[ring] = max(self.ring_tokens[ring], self.tokens[rank])

    def _share(self, document: int, ring: int) -> None:
        ranks, documents = self.rings[ring]
        load, tokens = self.work[document] / len(ranks), -(-self.lengths[document] // len(ranks))
        for loads, held, place in (
            (self.loads, self.tokens, slice(ranks.start, ranks.stop)),
            (self.ring_loads, self.ring_tokens, ring),
        ):
            loads[place] += load
            held[place] += tokens
        documents.append(document)

    def _placed(self) -> tuple[Ring, ...]:
        shared = [
            Ring(
                first=ranks.start,
                size=len(ranks),
                documents=tuple(sorted(documents)),
                alone=tuple(tuple(sorted(self.alone[rank])) for rank in ranks),
            )
            for ranks, documents in self.rings
        ]
        rest = range(self.used, self.world_size)
        return (*shared, *(Ring(first=rank, size=1, documents=tuple(sorted(self.alone[rank]))) for rank in rest))
