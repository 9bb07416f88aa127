"""What the ranks must agree on before the first hop; every rank learns of a fault on any."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from . import balance
from .arrays import Array, View, as_operands, host_view
from .errors import ArrayError, RankMismatch, RingsimError, WorkloadError
from .mask import Causal, Documents, Full, Mask, both, mask_named, shortened
from .partition import Partition
from .schedule import Schedule
from .transport import Transport
from .workload import DERIVED, Workload, check_scale

LONGEST: Final = 60
"""Characters of a setting in a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the caller of `ring_attention` chose, besides the mask; all ranks must choose alike."""

    partition: str
    softmax_scale: float | None
    strategy: str
    sync: str
    return_lse: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Visibility:
    """The ways to say who sees whom; a query sees what all of them let it see."""

    causal: bool
    mask: Mask | str | None
    cu_seqlens: Any

    def compose(self) -> tuple[Mask, int | None]:
        """The mask of all, and how many tokens cu_seqlens count. Raises WorkloadError, ArrayError."""
        if not isinstance(self.causal, bool | np.bool_):
            raise WorkloadError(f"causal is {self.causal!r}; give True or False")
        masks: list[Mask] = [Causal()] if self.causal else []
        if self.mask is not None:
            masks.append(mask_of(self.mask))
        tokens = None
        if self.cu_seqlens is not None:
            plain = isinstance(self.cu_seqlens, list | tuple)
            bounds = self.cu_seqlens if plain else host_view("cu_seqlens", self.cu_seqlens)
            documents = Documents.from_cu_seqlens(bounds)
            masks.append(documents)
            tokens = documents.extent
        return masks[0] if len(masks) == 1 else both(*masks), tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """The local shapes and dtypes of q, k and v, the name of the mask, and the options."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    packed: bool
    mask: str
    options: Options

    def fixed(self) -> dict[str, Any]:
        """What must be the same on every rank: all but the number of rows."""
        names = ("q", "k", "v")
        parts = {
            name: f"{dtype}({'' if self.packed else f'{s[0]}, '}..., {', '.join(map(str, s[2:]))})"
            for name, dtype, s in zip(names, self.dtypes, self.shapes, strict=True)
        }
        return parts | {"mask": self.mask} | {name: getattr(self.options, name) for name in Options.__dataclass_fields__}


def raise_common(transport: Transport, complaint: str | None) -> None:
    """Raise RankMismatch on every rank if any has a complaint; collective."""
    raise_if_any(transport.allgather(complaint))


def same_call(transport: Transport, complaint: str | None, call: str) -> None:
    """Raise RankMismatch on every rank if any has a complaint, or unless all make the same call; collective."""
    said = transport.allgather((complaint, call))
    raise_if_any([message for message, _ in said])
    calls = [{"pass": made} for _, made in said]
    raise_if_any([_difference(made, calls) for made in calls])


def same_settings(transport: Transport, settings: dict[str, Any]) -> None:
    """Raise RankMismatch on every rank unless all have the same settings; collective."""
    said = transport.allgather(settings)
    raise_if_any([_difference(found, said) for found in said])


def same_plan(transport: Transport, build: Callable[[], Schedule], *, check: bool) -> Schedule:
    """Build a schedule, and make sure that all ranks built the same.

    Raises the builder's own error where it fails, RankMismatch on the other ranks and where schedules differ.
    """
    plan: Schedule | None = None
    failure: RingsimError | None = None
    try:
        plan = build()
    except RingsimError as error:
        failure = error
    inputs = {} if plan is None else _flat(plan.inputs()) | {"check": check}
    said = transport.allgather((None if failure is None else str(failure), inputs))
    if failure is not None:
        raise failure
    raise_if_any([message for message, _ in said])
    found = [entry for _, entry in said]
    raise_if_any([_difference(entry, found) for entry in found])
    if plan is None:
        raise WorkloadError("no plan was built")
    return plan


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested values with one key each."""
    workload = values.pop("workload")
    return values | {f"workload {name}": value for name, value in workload.items()}


def common_workload(
    transport: Transport, arrays: tuple[Any, Any, Any], options: Options, visibility: Visibility, view: View = host_view
) -> Workload:
    """The global workload of every rank's shards; collective. Raises RankMismatch on every rank if they do not fit together."""
    mine, fault = None, None
    mask: Mask = Full()
    tokens: int | None = None
    try:
        found, packed = as_operands(*arrays, view)
        mask, tokens = visibility.compose()
        if options.softmax_scale is not None:
            check_scale(options.softmax_scale, found[0].dtype.name)
        shapes, dtypes = tuple(a.shape for a in found), tuple(a.dtype.name for a in found)
        mine = Shards(shapes=shapes, dtypes=dtypes, packed=packed, mask=mask.name, options=options)
    except (ArrayError, WorkloadError) as error:
        fault = str(error)
    said = transport.allgather((mine, fault))
    raise_if_any([message for _, message in said])
    shards: list[Shards] = [entry for entry, _ in said]
    fixed = [shard.fixed() for shard in shards]
    raise_if_any([_difference(entry, fixed) for entry in fixed])
    _check_shapes(shards)
    q_len, kv_len = (sum(shard.shapes[i][1] for shard in shards) for i in (0, 1))
    if tokens is not None and not tokens == q_len == kv_len:
        held = f"{q_len} tokens" if q_len == kv_len else f"{q_len} queries and {kv_len} keys"
        raise WorkloadError(f"cu_seqlens end at {tokens}, the ranks hold {held} in all; the last must be their number")
    q, k, v = shards[0].shapes
    workload = Workload(
        q_len=q_len,
        kv_len=kv_len,
        batch=q[0],
        heads=q[2],
        kv_heads=k[2],
        head_dim=q[3],
        v_head_dim=v[3],
        dtype=shards[0].dtypes[0],
        mask=mask,
        softmax_scale=DERIVED if options.softmax_scale is None else options.softmax_scale,
    )
    queries, keys = balance.partitions(options.partition, workload, transport.world_size)
    for i, (name, split) in enumerate(zip("qkv", (queries, keys, keys), strict=True)):
        _check_rows(name, [shard.shapes[i][1] for shard in shards], split, options.partition)
    return workload


def _difference(found: dict[str, Any], all_found: list[dict[str, Any]]) -> str | None:
    """How a rank's settings differ from what most ranks have."""
    usual = max(all_found, key=all_found.count)
    rank = all_found.index(usual)
    names = dict.fromkeys([*usual, *found])
    differing = [name for name in names if found.get(name) != usual.get(name)]
    said = []
    for name in differing:
        mine, theirs = str(found.get(name)), str(usual.get(name))
        said.append(f"{name} is {_excerpt(mine, theirs)} where rank {rank} has {_excerpt(theirs, mine)}")
    return ", ".join(said) or None


def _excerpt(text: str, other: str) -> str:
    """`text`, or of a long one the part where it begins to differ from `other`."""
    if len(text) <= LONGEST:
        return text
    differs = next((at for at, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    begin = min(max(0, differs - LONGEST // 3), len(text) - LONGEST)
    end = begin + LONGEST
    return f"{'...' if begin else ''}{text[begin:end]}{'...' if end < len(text) else ''}"


def _check_shapes(shards: list[Shards]) -> None:
    shard = shards[0]
    q, k, v = shard.shapes
    fits = q[0] == k[0] == v[0] and k[1] == v[1] and k[2] == v[2] and q[3] == k[3]
    if not fits or len(set(shard.dtypes)) > 1:
        shown = ", ".join(f"{name} {dtype}{shape}" for name, dtype, shape in zip("qkv", shard.dtypes, shard.shapes, strict=True))
        raise RankMismatch(f"q, k and v do not fit together on rank 0: {shown}")
    raise_if_any([_uneven(one) for one in shards])


def _uneven(shard: Shards) -> str | None:
    k, v = (shape[1] for shape in shard.shapes[1:])
    return None if k == v else f"k has {k} rows and v {v}"


def _check_rows(name: str, rows: list[int], split: Partition, partition: str) -> None:
    """Raise RankMismatch unless these are the rows per rank of the partition."""
    expected = [split.count(rank) for rank in range(len(rows))]
    wrong = [
        f"rank {rank} has {held}, not {right}"
        for rank, (held, right) in enumerate(zip(rows, expected, strict=True))
        if held != right
    ]
    if wrong:
        raise RankMismatch(f"rows of {name} are no {shortened(partition)} partition of {split.length} tokens: {'; '.join(wrong)}")


def with_axis(x: Any, axis: int) -> Array:
    """`x` as an array that has this axis. Raises ArrayError."""
    array = host_view("x", x)
    if not -array.ndim <= axis < array.ndim:
        raise ArrayError(f"x has {array.ndim} dimensions; there is no axis {axis}")
    return array


def partition_of(partition: str, length: int, world_size: int, mask: Mask | str | None) -> Partition:
    """The partition of one array. Raises WorkloadError, also where ``balanced`` is asked for and no mask is given."""
    if mask is None and partition.strip().startswith("balanced"):
        raise WorkloadError(f"partition {partition!r} depends on the mask: give mask=, that of the attention to come")
    seen = Full() if mask is None else mask_of(mask)
    return balance.partitions(partition, Workload(q_len=length, mask=seen), world_size)[0]


def mask_of(mask: Any) -> Mask:
    """A mask, or the one that a text names. Raises WorkloadError for anything else."""
    if isinstance(mask, str):
        return mask_named(mask)
    if not (hasattr(mask, "pieces") and hasattr(mask, "name")):
        raise WorkloadError(
            f"mask is {type(mask).__name__}; give a mask of ringsim or its text, such as 'causal'; ringsim.BlockSparse takes a "
            "boolean map"
        )
    found: Mask = mask
    return found


def common_parts(transport: Transport, x: Any, partition: str, axis: int, mask: Mask | str | None) -> tuple[list[Any], Partition]:
    """Every rank's shard, on every rank, and how they fit together; collective.

    Raises RankMismatch on every rank if they are not those of one array, or if ranks ask for different things.
    """
    mine, fault = None, None
    try:
        seen = None if mask is None else mask_of(mask)
        mine = with_axis(x, axis), {"partition": partition, "mask": None if seen is None else seen.name, "axis": axis}
        if partition.strip().startswith("balanced") and seen is None:
            partition_of(partition, 1, 1, seen)
    except (ArrayError, WorkloadError) as error:
        fault = str(error)
    said = transport.allgather((mine, fault))
    raise_if_any([message for _, message in said])
    parts = [part for (part, _), _ in said]
    settings = [
        asked
        | {"dtype": part.dtype.name}
        | {f"length of axis {index}": size for index, size in enumerate(part.shape) if index != axis % part.ndim}
        for (part, asked), _ in said
    ]
    raise_if_any([_difference(entry, settings) for entry in settings])
    rows = [part.shape[axis] for part in parts]
    split = partition_of(partition, sum(rows), transport.world_size, mask)
    _check_rows("x", rows, split, partition)
    return parts, split


def raise_if_any(complaints: list[str | None]) -> None:
    """Raise RankMismatch if there is a complaint; `complaints` are those of all ranks, by rank."""
    faults = [f"rank {rank}: {message}" for rank, message in enumerate(complaints) if message]
    if faults:
        raise RankMismatch("; ".join(faults))
