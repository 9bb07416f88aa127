"""The library API: ring attention and its gradients, as one call or as a plan."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import numpy.typing as npt

from . import agreement
from .arrays import as_inputs, check_apart, on_device, share_memory, writable
from .communicators import closing, transport_of
from .engine import Engine, engine_of
from .errors import ArrayError, WorkloadError
from .execution import Backend, Rank, clock
from .footprint import Footprint
from .mask import Mask
from .schedule import Schedule, Send
from .schedule.job import GIVEN
from .schedule.registry import find
from .tile import IntArray
from .timeline import Timeline, gather
from .workload import Workload

Array = npt.NDArray[Any]


NOTHING_SAVED: Final = (
    "there is nothing to go back from: call the plan first, with a place of its own for `out`, or give `saved`: q, k, v, out "
    "and lse"
)


class _Arrays(NamedTuple):
    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any


class Saved(_Arrays):
    """What the backward pass needs of a forward one: this rank's q, k, v, out and lse, as the caller sees them.

    `call` is the plan's number of that call, by which ranks see that all go back through the same one; 0 if nobody knows.
    """

    call = 0

    def of_call(self, number: int) -> Saved:
        """The same arrays, as those of this call."""
        self.call = number
        return self


class RingAttention:
    """A plan: the schedule of `workload` on `comm`, its buffers made once, to be called many times.

    `comm` is an mpi4py communicator (any sub-communicator; it is duplicated), a `ringsim.transport.Transport`, or None for
    this process alone. `partition` is a text such as ``zigzag`` (docs/partitions.md), `strategy` one such as
    ``double-ring(8)`` (docs/strategies.md), `sync` ``free`` or ``step``. `backend` is ``numpy`` or ``cupy``, or one made before;
    `transport` says how messages between devices travel (docs/gpu.md); or both come with an `engine` that other plans use too, in
    place of `comm`. `threads`, of ``numpy``, defaults to the cores of the host over its ranks. With ``check=False`` a call no
    longer compares shapes, passes and calls between ranks. The program of the workload's pass is made at once, that of another
    when it is first called; slots are shared. Every method that runs is collective.
    Raises WorkloadError, RankMismatch, MissingDependency, DeviceError, TransportError.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        comm: Any = None,
        partition: str = "contiguous",
        strategy: str = "ring",
        sync: str = "free",
        backend: str | Backend = "numpy",
        transport: str = "auto",
        engine: Engine | None = None,
        threads: int | None = None,
        timeout_s: float = 300.0,
        check: bool = True,
    ) -> None:
        control = transport_of(comm, timeout_s) if engine is None else engine.control

        def build() -> Schedule:
            world_size = control.world_size
            return Schedule(workload=workload, world_size=world_size, partition=partition, strategy=strategy, sync=sync)

        self.schedule = agreement.same_plan(control, build, check=check)
        self.engine: Engine = engine or engine_of(
            control,
            backend=backend,
            transport=transport,
            threads=threads,
            peers=lambda: _peers(self.schedule, control.rank),
        )
        """What runs the plan: its backend and transport, and why these."""
        self._transport, self._backend = self.engine.transport, self.engine.backend
        self._rank = self._last = Rank(self.schedule, self._transport, self._backend, timeout_s=timeout_s)
        self._ranks = {workload.pass_: self._rank}
        self._check = check
        self._clock = clock.offsets(control)
        self.calls = 0
        """Runs so far."""
        self.saved: Saved | None = None
        self._closed = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Local shapes of what the workload's pass takes, forward q, k, v and out: (batch, local seq, heads, head_dim)."""
        return self._rank.shapes()

    @property
    def positions(self) -> dict[str, IntArray]:
        """Global positions of this rank's rows of q, and of k and v, in their order; rotary embeddings need them."""
        job, rank = self.schedule.job, self._transport.rank
        return {"q": job.q_partition.positions(rank), "kv": job.kv_partition.positions(rank)}

    @property
    def nbytes(self) -> int:
        """Bytes of buffers that this rank's plan holds; the arrays of a call are the caller's."""
        return sum(rank.memory.nbytes for rank in self._ranks.values())

    @property
    def scratch_nbytes(self) -> int:
        """Bytes of the backend's scratch, which the first call makes."""
        return self._backend.nbytes

    @property
    def footprint(self) -> Footprint:
        """What this rank holds while it runs the workload's pass, the caller's arrays included, by class: the model's answer."""
        return self._backend.footprint(self.schedule, self._transport.rank)

    def __call__(self, q: Any, k: Any, v: Any, *, out: Any = None, stream: Any = None) -> Array:
        """Attention of the local shards; returns this rank's rows of the output (or fills and returns `out`).

        The plan keeps references to the arrays of this call in `saved`, for `backward`, until the next call or until it is None.
        Shapes as in `shapes`, or, if the workload has one sequence, without the first axis, as is then what is returned; dtype
        that of the workload; anything with ``__dlpack__`` or the buffer protocol. On a device the call returns when all messages
        have come and all kernels are queued: they follow what `stream` (CuPy's, torch's, its address; None: CuPy's current one)
        was given before, and what it is given afterwards follows them. Raises RankMismatch on every rank if a shard does not fit
        on one, PeerTimeout if a peer does not come.
        """
        return self.with_lse(q, k, v, out=out, stream=stream)[0]

    def with_lse(self, q: Any, k: Any, v: Any, *, out: Any = None, stream: Any = None) -> tuple[Array, Array]:
        """As a call, and the log-sum-exp of each row's scores, (batch, heads, local seq), in the dtype of the partials."""
        (result,), lse = self._run("forward", {"q": q, "k": k, "v": v}, {"out": out}, stream)
        return result, lse

    def backward(
        self, dout: Any, saved: Saved | None = None, *, dq: Any = None, dk: Any = None, dv: Any = None, stream: Any = None
    ) -> tuple[Array, Array, Array]:
        """The gradients dq, dk and dv of this rank's rows (made, or those given filled), from that of out, shaped as it is.

        Of the last call; with `saved`, the plan's `saved` after another one (or any five of q, k, v, out and lse), of that: a
        plan serves many layers, each of which keeps its own. These are the caller's own arrays (also `out`, if it was given):
        they must be as they were. All in the dtype of the workload. The order of summation follows from the schedule alone:
        equal inputs give equal bits. Raises as a call does, also without a call before. Source: FlashAttention-2, arXiv
        2307.08691, algorithm 2.
        """
        found = self.saved if saved is None else saved
        given = dict(zip(Saved._fields, found, strict=False)) if isinstance(found, tuple | list) else {}
        call = found.call if isinstance(found, Saved) else 0
        made, _ = self._run("backward", given | {"dout": dout}, {"dq": dq, "dk": dk, "dv": dv}, stream, call=call)
        return made[0], made[1], made[2]

    def both(
        self,
        q: Any,
        k: Any,
        v: Any,
        dout: Any,
        *,
        out: Any = None,
        dq: Any = None,
        dk: Any = None,
        dv: Any = None,
        stream: Any = None,
    ) -> tuple[Array, Array, Array, Array]:
        """Forward and backward as one program, as ``pass_="both"`` predicts it: out, dq, dk and dv of this rank's rows."""
        given, taken = {"q": q, "k": k, "v": v, "dout": dout}, {"out": out, "dq": dq, "dk": dk, "dv": dv}
        made, _ = self._run("both", given, taken, stream)
        return made[0], made[1], made[2], made[3]

    def _run(
        self, pass_: str, given: dict[str, Any], taken: dict[str, Any], stream: Any, *, call: int = 0
    ) -> tuple[list[Array], Array]:
        """Run a pass on what the caller gives; what it makes, as the caller sees it, and lse."""
        if self._closed:
            raise WorkloadError("the plan is closed: make a new one")
        rank = self._rank_for(pass_)
        complaint, inputs, outputs, packed = self._prepare(rank, given, taken, stream)
        if self._check:
            agreement.same_call(self.engine.control, complaint, f"{pass_}{f' of call {call}' if call else ''}")
        elif complaint is not None:
            raise ArrayError(f"rank {self._transport.rank}: {complaint}")
        lse = rank.run(*inputs, *(array[None] if packed else array for array in outputs), stream=stream)
        self._last = rank
        self.calls += 1
        if packed:
            inputs, lse = [array[0] for array in inputs], lse[0]
        if pass_ != "backward":
            # an output over q leaves nothing to go back from
            lost = share_memory(inputs[0], outputs[0])
            self.saved = None if lost else Saved(inputs[0], inputs[1], inputs[2], outputs[0], lse).of_call(self.calls)
        return outputs, lse

    def _rank_for(self, pass_: str) -> Rank:
        """The program of a pass, made when it is first asked for."""
        if pass_ not in self._ranks:
            schedule = replace(self.schedule, workload=replace(self.schedule.workload, pass_=pass_))
            options: dict[str, Any] = {"timeout_s": self._rank.timeout_s, "beside": self._rank.memory}
            self._ranks[pass_] = Rank(schedule, self._transport, self._backend, **options)
        return self._ranks[pass_]

    def _prepare(
        self, rank: Rank, given: dict[str, Any], taken: dict[str, Any], stream: Any
    ) -> tuple[str | None, list[Array], list[Array], bool]:
        """What is wrong, if anything; what is given, with all axes; what is taken, as the caller sees it; whether packed."""
        try:
            if set(given) < set(GIVEN[rank.schedule.workload.pass_]):
                raise ArrayError(NOTHING_SAVED)
            inputs, packed = as_inputs(given, self._backend.view)
            outputs = []
            for name, value in taken.items():
                shape, dtype = rank.shapes()[name], rank.dtype(name)
                shape = shape[1:] if packed else shape
                make, view = self._backend.new, self._backend.view
                outputs.append(make(shape, dtype, stream) if value is None else writable(name, value, shape, dtype, view))
            check_apart(dict(zip(given, inputs, strict=True)), dict(zip(taken, outputs, strict=True)))
        except ArrayError as error:
            return str(error), [], [], False
        return rank.complaint(*inputs), inputs, outputs, packed

    def timeline(self) -> Timeline:
        """The last call's timeline over all ranks, on every rank; collective. Raises WorkloadError before the first call."""
        if self._last.timeline is None:
            raise WorkloadError("there is no timeline before the first call of the plan")
        offsets = clock.offsets(self.engine.control)
        parts = self.engine.control.allgather(clock.shift(self._last.timeline, offsets.mine(self._clock)))
        return gather(parts)

    def close(self) -> None:
        """Free the duplicated communicator, and what moves messages between devices; collective. The plan runs no more."""
        self._closed = True
        self.engine.close()

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
    backend: str | None = None,
    transport: str = "auto",
    stream: Any = None,
    threads: int | None = None,
    timeout_s: float = 300.0,
) -> Any:
    """Exact attention over a sequence that is split over the ranks of `comm`: local shards in, local shard out.

    q is (batch, local seq, heads, head_dim), k and v (batch, local seq, kv_heads, head_dim or v_head_dim); each rank holds the
    tokens that `partition` gives it (see `shard` and docs/partitions.md). A query sees the keys that all of `causal`, `mask` (a
    mask of ringsim, or its text, such as ``"window(4K, 0)"``) and `cu_seqlens` let it see; these are the cumulative lengths of
    documents packed into one sequence, over the tokens of all ranks: 0, ..., their number. Collective. Returns this rank's rows
    of the output, and with `return_lse` also lse (batch, heads, local seq); for 3-D q, k and v (local tokens, heads, head_dim),
    all without the batch. The arrays' memory decides the `backend`, if none is named: numpy on the host, cupy on a CUDA device,
    with `transport` and `stream` as a plan has them. For repeated calls make a `RingAttention` plan. Raises RankMismatch on every
    rank, before the first hop, if shapes, dtypes or options do not fit together. Source: Ring Attention, arXiv 2310.01889; merge
    by log-sum-exp, FlashAttention-2, arXiv 2307.08691.
    """
    control = transport_of(comm, timeout_s)
    with closing(control, comm):
        options = agreement.Options(
            partition=partition, softmax_scale=softmax_scale, strategy=strategy, sync=sync, return_lse=return_lse
        )
        visibility = agreement.Visibility(causal=causal, mask=mask, cu_seqlens=cu_seqlens)
        engine = engine_of(control, backend=backend or _backend_for(q), transport=transport, threads=threads)
        workload = agreement.common_workload(control, (q, k, v), options, visibility, engine.backend.view)
        plan = RingAttention(workload, engine=engine, partition=partition, strategy=strategy, sync=sync, timeout_s=timeout_s)
        result, lse = plan.with_lse(q, k, v, out=out, stream=stream)
        engine.release()
    return (result, lse) if return_lse else result


def ring_attention_backward(  # noqa: PLR0917 - the operands of one formula, none of which has a default
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    comm: Any = None,
    causal: bool = False,
    mask: Mask | str | None = None,
    cu_seqlens: Any = None,
    partition: str = "contiguous",
    softmax_scale: float | None = None,
    strategy: str = "ring",
    sync: str = "free",
    backend: str | None = None,
    transport: str = "auto",
    stream: Any = None,
    threads: int | None = None,
    timeout_s: float = 300.0,
) -> tuple[Array, Array, Array]:
    """The gradients dq, dk and dv of `ring_attention`, of this rank's rows: local shards in, local shards out.

    `dout` is the gradient of `out`; out and lse are those that ``ring_attention(..., return_lse=True)`` returned for q, k and v
    under the same options. Shapes, backend and stream as there; gradients are shaped as q, k and v, in their dtype. Collective.
    For repeated calls make a `RingAttention` plan and call its `backward`. Raises RankMismatch on every rank, before the first
    hop, if shapes, dtypes or options do not fit together. Source: FlashAttention-2, arXiv 2307.08691, algorithm 2.
    """
    control = transport_of(comm, timeout_s)
    with closing(control, comm):
        options = agreement.Options(
            partition=partition, softmax_scale=softmax_scale, strategy=strategy, sync=sync, return_lse=True
        )
        visibility = agreement.Visibility(causal=causal, mask=mask, cu_seqlens=cu_seqlens)
        engine = engine_of(control, backend=backend or _backend_for(q), transport=transport, threads=threads)
        workload = agreement.common_workload(control, (q, k, v), options, visibility, engine.backend.view)
        plan = RingAttention(
            replace(workload, pass_="backward"),
            engine=engine,
            partition=partition,
            strategy=strategy,
            sync=sync,
            timeout_s=timeout_s,
        )
        made = plan.backward(dout, Saved(q, k, v, out, lse), stream=stream)
        engine.release()
    return made


def _backend_for(array: Any) -> str:
    """Where an array lies decides what computes with it."""
    return "cupy" if on_device(array) else "numpy"


def _peers(schedule: Schedule, rank: int) -> set[int]:
    """Whom a rank sends to in any pass that its strategy has."""
    passes = ("forward", "both") if find(schedule.strategy).strategy.backward is not None else ("forward",)
    programs = (replace(schedule, workload=replace(schedule.workload, pass_=one)).program(rank) for one in passes)
    return {op.peer for program in programs for op in program if isinstance(op, Send)}
