"""Rings of different sizes in one job: long documents on many ranks, short ones on few or on one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import ceil
from typing import Any, Final

from .errors import RankMismatch, WorkloadError
from .partition import runs_text

TARGETS: Final = (1.0, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 2.0)
"""Work per rank, over the mean, above which a document gets another rank: these plans are compared."""
SLACK: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """`size` ranks from `first` on, and the documents, by index, that they share."""

    first: int
    size: int
    documents: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A rank's place: its ring, and the communicator of that ring's ranks in their order (the caller frees it)."""

    comm: Any
    ring: Ring


@dataclass(frozen=True, kw_only=True)
class RingSizes:
    """A plan: rings that share no rank and use every one, each document on one of them.

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
        ring_of = {document: ring for ring in self.rings for document in ring.documents}
        runs: list[tuple[int, int]] = []
        for document in range(len(self.lengths)):
            runs += self._runs(document, ring_of[document])
        return runs_text(runs)

    @cached_property
    def work(self) -> tuple[int, ...]:
        """Visible (query, key) pairs of each rank."""
        work = [0] * self.world_size
        for ring, document in self._places():
            begin = 0
            for owner, count in self._runs(document, ring):
                work[owner] += _pairs(begin + count, begin, self.lengths[document], self.causal)
                begin += count
        return tuple(work)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        tokens = [0] * self.world_size
        for ring, document in self._places():
            for owner, count in self._runs(document, ring):
                tokens[owner] += count
        return tuple(tokens)

    @property
    def moved_tokens(self) -> int:
        """Tokens whose keys and values move one hop, over all documents: (size - 1) for each token."""
        return sum((ring.size - 1) * self.lengths[document] for ring, document in self._places())

    def split(self, comm: Any) -> Seat:
        """This rank's ring as a communicator, by ``comm.Split`` of an mpi4py communicator; collective. Raises RankMismatch."""
        if comm.Get_size() != self.world_size:
            raise RankMismatch(f"the rings are for {self.world_size} ranks, the communicator has {comm.Get_size()}")
        rank = comm.Get_rank()
        ring = next(ring for ring in self.rings if ring.first <= rank < ring.first + ring.size)
        return Seat(comm=comm.Split(ring.first, rank), ring=ring)

    def _places(self) -> Iterator[tuple[Ring, int]]:
        return ((ring, document) for ring in self.rings for document in ring.documents)

    def _runs(self, document: int, ring: Ring) -> tuple[tuple[int, int], ...]:
        """(rank, tokens) in the order of the document."""
        return tuple((ring.first + owner, count) for owner, count in _cut(self.lengths[document], ring.size, self.causal))


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
    rounded up, the heaviest first, and the rest go to the ring that is then least laden. Of these plans, and one ring of all
    ranks, the one that moves fewest tokens among those whose largest work is within ``1 + slack`` of the least. `most_tokens`
    bounds the tokens of a rank. Raises WorkloadError. The problem is that of FlexSP (arXiv 2412.01523) and ByteScale (arXiv
    2502.21231), solved here without a model of the machine: simulate the result.
    """
    _check(lengths, world_size, most_tokens)
    total = sum(_pairs(length, 0, length, causal) for length in lengths)
    targets = [factor * total / world_size for factor in TARGETS]
    drafts = [_draft(lengths, world_size, causal, most_tokens, target) for target in (*targets, 0.0)]
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


@dataclass(slots=True)
class _Draft:
    """A ring being filled."""

    size: int
    work: int = 0
    tokens: int = 0
    documents: list[int] = field(default_factory=list)

    def with_work(self, work: int) -> float:
        """Work per rank if so much is added."""
        return (self.work + work) / self.size

    def add(self, document: int, work: int, tokens: int) -> None:
        self.work += work
        self.tokens += tokens
        self.documents.append(document)


def _draft(
    lengths: Sequence[int], world_size: int, causal: bool, most_tokens: int | None, target: float
) -> tuple[Ring, ...] | None:
    """Rings for a target of work per rank (0: one ring of all); None if a document has no place."""
    work = [_pairs(length, 0, length, causal) for length in lengths]
    rings: list[_Draft] = []
    free = world_size
    for document in sorted(range(len(lengths)), key=lambda document: (-work[document], document)):
        mine, tokens = work[document], lengths[document]
        size = min(world_size, max(1, ceil(mine / target))) if target else world_size
        shares = max(1, -(-tokens // most_tokens)) if most_tokens else 1
        size = max(size, shares)
        fitting = [ring for ring in rings if ring.size >= shares and _fits(ring, tokens, most_tokens)]
        best = min(fitting, key=lambda ring: (ring.with_work(mine), ring.size), default=None)
        # a document that needs several ranks gets a ring of its own, another one where that beats the least laden
        if size <= free and (best is None or size > 1 or best.with_work(mine) > mine):
            best = _Draft(size)
            rings.append(best)
            free -= size
        if best is None:
            return None
        best.add(document, mine, tokens)
    return _placed([*rings, *(_Draft(1) for _ in range(free))])


def _fits(ring: _Draft, tokens: int, most_tokens: int | None) -> bool:
    return most_tokens is None or ring.tokens + tokens <= ring.size * most_tokens


def _placed(drafts: Iterable[_Draft]) -> tuple[Ring, ...]:
    """The large rings first, each from where the one before ends: sizes that divide each other stay within nodes."""
    rings, first = [], 0
    for draft in sorted(drafts, key=lambda draft: -draft.size):
        rings.append(Ring(first=first, size=draft.size, documents=tuple(sorted(draft.documents))))
        first += draft.size
    return tuple(rings)
