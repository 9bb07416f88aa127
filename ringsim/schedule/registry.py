"""The strategies by name: each is a function that builds one rank's program, with whole numbers as its own arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from .. import calls
from ..errors import RingsimError, WorkloadError
from ..mask import Full
from ..units import parse_tokens
from ..workload import Workload
from .emitter import Emitter
from .job import Job
from .ops import Op

Build = Callable[..., Iterator[Op]]
TOLD: Final = 3
"""What every builder is told before its own arguments: job, rank and emitter."""


@dataclass(frozen=True, slots=True)
class Strategy:
    """`build(job, rank, emit, *arguments)` yields the ops of a rank, `backward`, if any, those of its backward pass; a change to
    these raises `version`.

    `adapt(workload, *arguments)` is the workload that is really computed, for a strategy that computes another. `turn(workload,
    *arguments)`, if any, is a number of ranks: those as far apart have programs that differ only in whom they talk to, where job
    tells both the same of their own tokens and of every rank at the same distance, up to the tiles between whole blocks of any
    heads. (The simulator then need not read all of a thousand programs to find ranks alike.) None where that is not so.
    """

    name: str
    version: int
    build: Build
    adapt: Callable[..., Workload] | None = None
    turn: Callable[..., int | None] | None = None
    backward: Build | None = None

    @property
    def parameters(self) -> tuple[inspect.Parameter, ...]:
        """Its own arguments."""
        return tuple(inspect.signature(self.build).parameters.values())[TOLD:]

    @property
    def usage(self) -> str:
        """How it is written, e.g. ``double-ring(inner, stride=1)``."""
        words = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in self.parameters]
        return f"{self.name}({', '.join(words)})" if words else self.name

    @property
    def summary(self) -> str:
        """The first line of its builder's docstring."""
        return (inspect.getdoc(self.build) or "").split("\n")[0]


@dataclass(frozen=True, slots=True)
class Choice:
    """A strategy with its arguments; `text` is the one way to write it."""

    strategy: Strategy
    arguments: tuple[int, ...]

    @property
    def text(self) -> str:
        """Name and arguments, without those at the end that are left at their defaults."""
        defaults = [p.default for p in self.strategy.parameters]
        given = list(self.arguments)
        while given and given[-1] == defaults[len(given) - 1]:
            given.pop()
        return f"{self.strategy.name}({', '.join(map(str, given))})" if given else self.strategy.name

    @property
    def backward(self) -> Build:
        """The builder of its backward pass. Raises WorkloadError where it has none."""
        if self.strategy.backward is None:
            raise WorkloadError(f"strategy {self.text!r} has no backward pass; use pass 'forward'")
        return self.strategy.backward

    def program(self, job: Job, rank: int, emit: Emitter) -> Iterator[Op]:
        """The ops of a rank, all its posts waited for: of the passes that the workload names, one after the other."""
        if job.workload.pass_ != "backward":
            yield from self.strategy.build(job, rank, emit, *self.arguments)
        if job.workload.pass_ != "forward":
            # steps of a pass count on from a multiple of the ranks, the same for all
            emit.count_from(-(-emit.steps // job.world_size) * job.world_size)
            yield from self.backward(job, rank, emit, *self.arguments)
        yield from emit.drain()

    def adapt(self, workload: Workload) -> Workload:
        """The workload that is really computed."""
        return workload if self.strategy.adapt is None else self.strategy.adapt(workload, *self.arguments)

    def turn(self, workload: Workload) -> int | None:
        """By how many ranks programs may be turned, see Strategy; None where that is not known."""
        return None if self.strategy.turn is None else self.strategy.turn(workload, *self.arguments)


def any_rank(workload: Workload, *arguments: int) -> int:
    """The `turn` of a strategy that moves whole blocks, or heads of them, by distances alone."""
    return 1


def where_all_is_seen(workload: Workload, *arguments: int) -> int | None:
    """The `turn` of one that cuts blocks by rows as well: those of two ranks are alike where no mask tells rows apart."""
    return 1 if isinstance(workload.mask, Full) and workload.lengths is None else None


STRATEGIES: Final[dict[str, Strategy]] = {}
"""Every known strategy by name."""


def strategy(
    name: str,
    *,
    version: int,
    adapt: Callable[..., Workload] | None = None,
    turn: Callable[..., int | None] | None = None,
    backward: Build | None = None,
) -> Callable[[Build], Build]:
    """Make the decorated builder a strategy called `name`, for the library and the command line alike; see Strategy.

    Raises WorkloadError where the name is taken by another builder.
    """

    def register(build: Build) -> Build:
        known = STRATEGIES.get(name)
        if known is not None and (known.build.__module__, known.build.__qualname__) != (build.__module__, build.__qualname__):
            raise WorkloadError(f"strategy {name!r} is already that of {known.build.__module__}")
        calls.parse_call(name, "strategy")
        STRATEGIES[name] = Strategy(name, version, build, adapt, turn, backward)
        _find.cache_clear()
        return build

    return register


def find(text: str) -> Choice:
    """The strategy that a text such as ``ring`` or ``double-ring(8)`` names. Raises WorkloadError."""
    if not isinstance(text, str):
        raise WorkloadError(f"strategy is {text!r}; give a text such as 'ring'")
    return _find(text)


@lru_cache(maxsize=256)
def _find(text: str) -> Choice:
    call = calls.parse_call(text, "strategy")
    known = STRATEGIES.get(call.name)
    if known is None:
        names = ", ".join(known.usage for _, known in sorted(STRATEGIES.items()))
        raise WorkloadError(f"unknown strategy {call.name!r}; known: {names}")
    try:
        bound = inspect.Signature(known.parameters).bind(*call.args, **call.named)
    except TypeError as error:
        raise WorkloadError(f"strategy {text!r}: {error}; write {known.usage}") from None
    bound.apply_defaults()
    return Choice(known, tuple(_whole(text, name, value) for name, value in bound.arguments.items()))


def _whole(text: str, name: str, value: Any) -> int:
    if isinstance(value, int):
        return value
    try:
        return parse_tokens(value)
    except RingsimError:
        raise WorkloadError(f"strategy {text!r}: {name} is {value!r}; give a whole number, such as 8 or 4K") from None
