"""Rings of different sizes in one job: long documents on many ranks, short ones on few or on one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import ceil, inf
from typing import Any, Final

from .errors import RankMismatch, WorkloadError
from .partition import runs_text

TARGETS: Final = (1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0)
"""Work per rank, over the mean, above which a document gets another rank: these plans are compared."""
SLACK: Final = 0.05


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
        work = [0] * self.world_size
        for document, first, size in self._places():
            begin = 0
            for owner, count in self._runs(document, first, size):
                work[owner] += _pairs(begin + count, begin, self.lengths[document], self.causal)
                begin += count
        return tuple(work)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        tokens = [0] * self.world_size
        for document, first, size in self._places():
            for owner, count in self._runs(document, first, size):
                tokens[owner] += count
        return tuple(tokens)

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
        for ring in self.rings:
            yield from ((document, ring.first, ring.size) for document in ring.documents)
            for place, documents in enumerate(ring.alone):
                yield from ((document, ring.first + place, 1) for document in documents)

    def _runs(self, document: int, first: int, size: int) -> tuple[tuple[int, int], ...]:
        """(rank, tokens) in the order of the document."""
        return tuple((first + owner, count) for owner, count in _cut(self.lengths[document], size, self.causal))


@lru_cache(maxsize=65536)
def _cut(length: int, size: int, causal: bool) -> tuple[tuple[int, int], ...]:
    """(rank of the ring, tokens): the runs of Partition zigzag, or contiguous, in the order of the document."""
    owners = (*range(size), *reversed(range(size))) if causal else tuple(range(size))
    share, longer = divmod(length, len(owners))
    return tuple((owner, share + (index < longer)) for index, owner in enumerate(owners))


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
    _check(lengths, world_size, most_tokens)
    total = sum(_pairs(length, 0, length, causal) for length in lengths)
    targets = [factor * total / world_size for factor in TARGETS]
    drafts = [_Draft(lengths, world_size, causal, most_tokens, target).fill() for target in (*targets, 0.0)]
    made = [
        RingSizes(lengths=tuple(lengths), world_size=world_size, causal=causal, rings=rings)
        for rings in drafts
        if rings is not None
    ]
    plans = [plan for plan in made if most_tokens is None or max(plan.tokens) <= most_tokens]
    if not plans:
        raise WorkloadError(
            f"documents of {sum(lengths)} tokens do not fit on {world_size} ranks of at most {most_tokens} in any way that was "
            "tried: raise most_tokens, take more ranks, or leave documents out"
        )
    limit = (1 + slack) * min(max(plan.work) for plan in plans)
    return min((plan for plan in plans if max(plan.work) <= limit), key=lambda plan: (plan.moved_tokens, max(plan.work)))


def _check(lengths: Sequence[int], world_size: int, most_tokens: int | None) -> None:
    if world_size < 1 or any(length < 0 for length in lengths):
        raise WorkloadError(f"rings need world_size >= 1 and lengths >= 0, not {world_size} and {min(lengths, default=0)}")
    if most_tokens is not None and sum(lengths) > most_tokens * world_size:
        raise WorkloadError(
            f"documents of {sum(lengths)} tokens do not fit on {world_size} ranks of at most {most_tokens}: "
            f"take {-(-sum(lengths) // max(most_tokens, 1))} ranks or raise most_tokens to {-(-sum(lengths) // world_size)}"
        )


def _pairs(end: int, begin: int, length: int, causal: bool) -> int:
    """Pairs of queries [begin, end) of a document."""
    return (end * (end + 1) - begin * (begin + 1)) // 2 if causal else (end - begin) * length


class _Draft:
    """Rings being made for a target of work per rank (0: one ring of all)."""

    def __init__(self, lengths: Sequence[int], world_size: int, causal: bool, most_tokens: int | None, target: float) -> None:
        self.loads = [0.0] * world_size
        self.tokens = [0] * world_size
        self.rings: list[tuple[range, list[int]]] = []
        self.alone: dict[int, list[int]] = {rank: [] for rank in range(world_size)}
        self._single = [range(rank, rank + 1) for rank in range(world_size)]
        self.used = 0
        self.lengths = lengths
        self.work = [_pairs(length, 0, length, causal) for length in lengths]
        self.most_tokens = most_tokens
        self.target = target

    def fill(self) -> tuple[Ring, ...] | None:
        """The rings; None if a document has no place."""
        for document in sorted(range(len(self.lengths)), key=lambda document: (-self.work[document], document)):
            size = self._wanted(document)
            if size > 1 and size <= len(self.loads) - self.used:
                self.rings.append((range(self.used, self.used + size), []))
                self.used += size
            shared = [ranks for ranks, _ in self.rings]
            # a document that one rank can take within the target moves nothing there
            chosen = self._best(document, self._single, self.target) if size == 1 else None
            chosen = chosen or self._best(document, [*shared, *(self._single if size == 1 else ())])
            if chosen is None:
                return None
            self._put(document, chosen)
        return self._placed()

    def _wanted(self, document: int) -> int:
        """Ranks for a document, by work and by memory."""
        by_work = ceil(self.work[document] / self.target) if self.target else len(self.loads)
        by_memory = -(-self.lengths[document] // self.most_tokens) if self.most_tokens else 1
        return min(len(self.loads), max(1, by_work, by_memory))

    def _best(self, document: int, places: Iterable[range], most: float = inf) -> range | None:
        """Where the most laden rank of the place has least to do, and no more than `most`, with its part of the document."""
        fitting = []
        for ranks in places:
            tokens = max(self.tokens[rank] for rank in ranks) + -(-self.lengths[document] // len(ranks))
            load = max(self.loads[rank] for rank in ranks) + self.work[document] / len(ranks)
            if load <= most and (self.most_tokens is None or tokens <= self.most_tokens):
                fitting.append((load, len(ranks), ranks.start, ranks))
        return min(fitting, key=lambda found: found[:3])[3] if fitting else None

    def _put(self, document: int, ranks: range) -> None:
        for rank in ranks:
            self.loads[rank] += self.work[document] / len(ranks)
            self.tokens[rank] += -(-self.lengths[document] // len(ranks))
        held = next((documents for shared, documents in self.rings if shared == ranks), None)
        (self.alone[ranks.start] if held is None else held).append(document)

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
        rest = range(self.used, len(self.loads))
        return (*shared, *(Ring(first=rank, size=1, documents=tuple(sorted(self.alone[rank]))) for rank in rest))
