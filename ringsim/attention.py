"""The library API: ring attention as one call or as a plan, and the way from global arrays to shards and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from . import agreement
from .arrays import as_operands, writable
from .dtypes import accumulator, numpy_dtype
from .errors import ArrayError, RankMismatch, RingsimError, TransportError, WorkloadError
from .execution import Rank, clock
from .footprint import Footprint, weigh
from .mask import Mask
from .schedule import Schedule
from .tile import IntArray
from .timeline import Timeline, gather
from .transport import Transport
from .workload import Workload

Array = npt.NDArray[Any]


class RingAttention:
    """A plan: the schedule of `workload` on `comm`, its buffers made once, to be called many times.

    `comm` is an mpi4py communicator (any sub-communicator; it is duplicated), a `ringsim.transport.Transport`, or None for
    this process alone. `partition` is a text such as ``zigzag`` (docs/partitions.md), `strategy` one such as ``double-ring(8)``
    (docs/strategies.md), `sync` ``free`` or ``step``. `threads` defaults to the cores of the host over its ranks. With
    ``check=False`` a call no longer compares shapes between ranks.
    Every method that runs is collective. Raises WorkloadError, RankMismatch, MissingDependency.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        comm: Any = None,
        partition: str = "contiguous",
        strategy: str = "ring",
        sync: str = "free",
        threads: int | None = None,
        timeout_s: float = 300.0,
        check: bool = True,
    ) -> None:
        self._transport = transport_of(comm, timeout_s)

        def build() -> tuple[Schedule, Any]:
            world_size = self._transport.world_size
            schedule = Schedule(workload=workload, world_size=world_size, partition=partition, strategy=strategy, sync=sync)
            return schedule, _backend(self._transport, threads)

        self.schedule, self._backend = agreement.same_plan(self._transport, build, check=check)
        self._rank = Rank(self.schedule, self._transport, self._backend, timeout_s=timeout_s)
        self._check = check
        self._clock = clock.offsets(self._transport)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Local shapes of q, k, v and out: (batch, local seq, heads, head_dim)."""
        return self._rank.shapes()

    @property
    def positions(self) -> dict[str, IntArray]:
        """Global positions of this rank's rows of q, and of k and v, in their order; rotary embeddings need them."""
        job, rank = self.schedule.job, self._transport.rank
        return {"q": job.q_partition.positions(rank), "kv": job.kv_partition.positions(rank)}

    @property
    def nbytes(self) -> int:
        """Bytes of buffers that this rank's plan holds; the arrays of a call are the caller's."""
        return self._rank.memory.nbytes

    @property
    def scratch_nbytes(self) -> int:
        """Bytes of the backend's scratch, which the first call makes."""
        scratch: int = self._backend.nbytes
        return scratch

    @property
    def footprint(self) -> Footprint:
        """What this rank holds while it runs, the caller's arrays included, by class: the model's answer."""
        blocking = self._backend.blocking(accumulator(self.schedule.workload.dtype))
        return weigh(self.schedule, self._transport.rank, blocking=blocking, threads=self._backend.threads)

    def __call__(self, q: Any, k: Any, v: Any, *, out: Any = None) -> Array:
        """Attention of the local shards; returns this rank's rows of the output (or fills and returns `out`).

        Shapes as in `shapes`, or, if the workload has one sequence, without the first axis, as is then what is returned; dtype
        that of the workload; anything with ``__dlpack__`` or the buffer protocol. Raises RankMismatch on every rank if a
        shard does not fit on one, PeerTimeout if a peer does not come.
        """
        return self.with_lse(q, k, v, out=out)[0]

    def with_lse(self, q: Any, k: Any, v: Any, *, out: Any = None) -> tuple[Array, Array]:
        """As a call, and the log-sum-exp of each row's scores, (batch, heads, local seq), in the dtype of the partials."""
        complaint, arrays, packed = self._prepare(q, k, v, out)
        if self._check:
            agreement.raise_common(self._transport, complaint)
        elif complaint is not None:
            raise ArrayError(f"rank {self._transport.rank}: {complaint}")
        q, k, v, result = arrays
        lse = self._rank.run(q, k, v, result[None] if packed else result)
        return result, lse[0] if packed else lse

    def _prepare(self, q: Any, k: Any, v: Any, out: Any) -> tuple[str | None, list[Array], bool]:
        """What is wrong, if anything; q, k and v with all axes and out as the caller sees it; whether these lack the first."""
        dtype = numpy_dtype(self.schedule.workload.dtype)
        shape = self.shapes["out"]
        try:
            arrays, packed = as_operands(q, k, v)
            shape = shape[1:] if packed else shape
            arrays.append(np.empty(shape, dtype) if out is None else writable("out", out, shape, dtype))
            for name, array in zip(("k", "v"), arrays[1:3], strict=True):
                if np.may_share_memory(array, arrays[3]):
                    raise ArrayError(f"out shares memory with {name}, which may still be on its way when out is written")
        except ArrayError as error:
            return str(error), [], False
        return self._rank.complaint(*arrays[:3]), arrays, packed

    def timeline(self) -> Timeline:
        """The last call's timeline over all ranks, on every rank; collective. Raises WorkloadError before the first call."""
        if self._rank.timeline is None:
            raise WorkloadError("there is no timeline before the first call of the plan")
        offsets = clock.offsets(self._transport)
        parts = self._transport.allgather(clock.shift(self._rank.timeline, offsets.mine(self._clock)))
        return gather(parts)

    def close(self) -> None:
        """Free the duplicated communicator; collective."""
        _close(self._transport, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()


def ring_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    comm: Any = None,
    causal: bool = False,
    mask: Mask | str | None = None,
    cu_seqlens: Any = None,
    partition: str = "contiguous",
    softmax_scale: float | None = None,
    strategy: str = "ring",
    sync: str = "free",
    out: Any = None,
    return_lse: bool = False,
    threads: int | None = None,
    timeout_s: float = 300.0,
) -> Any:
    """Exact attention over a sequence that is split over the ranks of `comm`: local shards in, local shard out.

    q is (batch, local seq, heads, head_dim), k and v (batch, local seq, kv_heads, head_dim or v_head_dim); each rank holds
    the tokens that `partition` gives it (see `shard` and docs/partitions.md). A query sees the keys that all of `causal`,
    `mask` (a mask of ringsim, or its text, such as ``"window(4K, 0)"``) and `cu_seqlens` let it see; these are the cumulative
    lengths of documents packed into one sequence, over the tokens of all ranks: 0, ..., their number. Collective. Returns this
    rank's rows of the output, and with `return_lse` also lse (batch, heads, local seq); for 3-D q, k and v (local tokens,
    heads, head_dim), all without the batch. For repeated calls make a `RingAttention` plan.
    Raises RankMismatch on every rank, before the first hop, if shapes, dtypes or options do not fit together.
    Source: Ring Attention, arXiv 2310.01889; merge by log-sum-exp, FlashAttention-2, arXiv 2307.08691.
    """
    transport = transport_of(comm, timeout_s)
    with _closing(transport, comm):
        options = agreement.Options(
            partition=partition, softmax_scale=softmax_scale, strategy=strategy, sync=sync, return_lse=return_lse
        )
        visibility = agreement.Visibility(causal=causal, mask=mask, cu_seqlens=cu_seqlens)
        workload = agreement.common_workload(transport, (q, k, v), options, visibility)
        plan = RingAttention(
            workload, comm=transport, partition=partition, strategy=strategy, sync=sync, threads=threads, timeout_s=timeout_s
        )
        result, lse = plan.with_lse(q, k, v, out=out)
    return (result, lse) if return_lse else result


def shard(x: Any, *, comm: Any = None, partition: str = "contiguous", mask: Mask | str | None = None, axis: int = 1) -> Array:
    """The rows of global array `x` (the same on every rank) that this rank holds under `partition`, split along `axis`.

    ``balanced`` needs the `mask` of the attention to come. A view where the rows are evenly spaced (contiguous, striped), else
    a copy. No communication. Raises WorkloadError, ArrayError.
    """
    array = agreement.with_axis(x, axis)
    rank, world_size = _place(comm)
    spans = agreement.partition_of(partition, array.shape[axis], world_size, mask).spans(rank)
    index: list[Any] = [slice(None)] * array.ndim
    parts = []
    for span in spans:
        index[axis] = slice(span.start, span.last + 1, span.step)
        parts.append(array[tuple(index)])
    if not parts:
        index[axis] = slice(0, 0)
        parts.append(array[tuple(index)])
    rows: Array = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)
    return rows


def unshard(
    x: Any,
    *,
    comm: Any = None,
    partition: str = "contiguous",
    mask: Mask | str | None = None,
    axis: int = 1,
    timeout_s: float = 300.0,
) -> Array:
    """The global array whose shards the ranks hold, on every rank: the inverse of `shard`. Collective.

    Raises RankMismatch on every rank if the shards are not those of one array under `partition`.
    """
    if comm is None:
        array = agreement.with_axis(x, axis)
        agreement.partition_of(partition, array.shape[axis], 1, mask)
        return array
    transport = transport_of(comm, timeout_s)
    with _closing(transport, comm):
        parts, split = agreement.common_parts(transport, x, partition, axis, mask)
    shape = list(parts[0].shape)
    shape[axis] = split.length
    result = np.empty(shape, parts[0].dtype)
    index: list[Any] = [slice(None)] * result.ndim
    for rank, part in enumerate(parts):
        index[axis] = split.positions(rank)
        result[tuple(index)] = part
    return result


def transport_of(comm: Any, timeout_s: float = 300.0) -> Transport:
    """The transport of a communicator; a Transport is returned as it is, None is a world of one."""
    if comm is None:
        from ringsim.backends.loopback import World

        return World(1).endpoint(0)
    if hasattr(comm, "irecv") and hasattr(comm, "poll"):
        found: Transport = comm
        return found
    from ringsim.backends.mpi import MpiTransport

    return MpiTransport(comm, timeout_s=timeout_s)


@contextmanager
def _closing(transport: Transport, comm: Any) -> Iterator[None]:
    """Free a duplicated communicator at the end, and after errors that all ranks raise: freeing is collective."""
    try:
        yield
    except RingsimError as error:
        if isinstance(error, RankMismatch) or not isinstance(error, TransportError):
            _close(transport, comm)
        raise
    _close(transport, comm)


def _close(transport: Transport, comm: Any) -> None:
    if transport is not comm:
        transport.close()


def _place(comm: Any) -> tuple[int, int]:
    if comm is None:
        return 0, 1
    return (comm.rank, comm.world_size) if hasattr(comm, "world_size") else (comm.Get_rank(), comm.Get_size())


def _backend(transport: Transport, threads: int | None) -> Any:
    from ringsim.backends.cpu import available_cores
    from ringsim.backends.numpy import NumpyBackend

    if threads is None:
        threads = max(1, available_cores() // transport.hosts.count(transport.hosts[transport.rank]))
    return NumpyBackend(threads=threads)
