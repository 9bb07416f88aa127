"""Tiles by cuDNN's fused attention, through its frontend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from weakref import finalize

from ringsim.backends.cuda import Calls, DeviceArray, Event, Stream
from ringsim.backends.cuda_state import StateKernels
from ringsim.backends.cuda_strides import address_of
from ringsim.backends.cuda_tiles import Backward, Band, Forward
from ringsim.backends.cudnn_limits import (
    ALIGNMENT,
    LSE_READ_WITH_STRIDES,
    ORDERED_DQ,
    Given,
    bounds_of,
    misfits,
    refusals,
    shares_of,
    stores_scores,
)
from ringsim.backends.cudnn_plans import BACKWARD, Plan, Problem, build, execute, layout_of, load, versions
from ringsim.dtypes import ITEMSIZE, numpy_dtype
from ringsim.errors import DeviceError

MOST_SCORES: Final = 1 << 30
"""Bytes: the most that a deterministic backward pass may store of score gradients before another way is taken."""


class Room:
    """One piece of device memory, grown to the most that was asked for. An outgrown piece waits until the device is done."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._piece: DeviceArray | None = None
        self._outgrown: list[tuple[Event, DeviceArray]] = []

    @property
    def nbytes(self) -> int:
        """Bytes held now, outgrown ones included."""
        pieces = [piece for _, piece in self._outgrown] + ([] if self._piece is None else [self._piece])
        return sum(int(piece.nbytes) for piece in pieces)

    def of(self, nbytes: int, stream: Stream) -> DeviceArray:
        """At least so many bytes, for what is queued next on `stream`, on which all earlier use was."""
        if self._piece is not None and self._piece.nbytes >= nbytes:
            return self._piece
        if self._piece is not None:
            self._outgrown.append((self._calls.record(stream), self._piece))
        self._outgrown = [(event, piece) for event, piece in self._outgrown if not self._calls.done(event)]
        self._piece = self._calls.empty(nbytes)
        return self._piece


class CudnnTiles:
    """Tiles by cuDNN, float16 and bfloat16, on a device of compute capability `capability`.

    Each tile's `out` is rounded once to the operands' dtype before it is merged in float32 (so are dq, dk and dv before they are
    added): one fused call over all keys rounds once in all. `lse` is float32. A graph is planned and built when a shape of tile
    is first met, with workspace for it; later ones only launch. cuDNN's deterministic algorithms are asked for; where these
    store the score gradients of a whole tile (compute capability 8.x, 9.x, 12.x), then up to `most_scores_nbytes`; above it dQ is
    summed in order on Hopper from cuDNN 9.25 on (slower, says its frontend). Elsewhere the tile is computed by sequences and
    heads, and refused (`unfit`) where those of one key/value head are beyond it.

    What travels in a ring is delta, and cuDNN's backward pass takes o in its place: of it only rowsum(o * dout) enters, in
    float32 (`CompositeSDPABackwardNode::expand_node`, "dO * o => softmax_sum"; dropout and sink tokens use the same sums), so a
    stand-in with these sums is as good. Raises MissingDependency where cuDNN or its frontend is not installed.
    """

    name = "cudnn"

    def __init__(self, calls: Calls, *, capability: tuple[int, int], most_scores_nbytes: int = MOST_SCORES) -> None:
        self._cudnn = load()
        self._calls = calls
        self._given = Given(int(self._cudnn.backend_version()), capability)
        self._most_scores = most_scores_nbytes
        calls.activate()
        self._handle = self._cudnn.create_handle()
        # cudnnDestroy waits for the device: plans that it still runs must not go before; not at exit, where nothing is freed
        finalize(self, self._cudnn.destroy_handle, self._handle).atexit = False
        self._state = StateKernels(calls)
        self._plans: dict[Problem, Plan] = {}
        self._workspace = Room(calls)
        self._stand_in = Room(calls)
        self._lse = Room(calls)
        self._stream: Stream | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held: cuDNN's workspace, the stand-in for o, and rows of lse."""
        return self._workspace.nbytes + self._stand_in.nbytes + self._lse.nbytes

    def facts(self) -> dict[str, Any]:
        """Versions of cuDNN and its frontend, and the engine and workspace of each plan so far."""
        plans = [f"{problem}: {plan.engine}, workspace {plan.workspace_nbytes} bytes" for problem, plan in self._plans.items()]
        return {**versions(self._cudnn), "cudnn_plans": plans}

    def partial(self, dtype: str) -> str:
        """The operands' own dtype: cuDNN's attention has no float32 output for them."""
        return dtype

    def refuses(self, dtype: str, widths: tuple[int, int], band: Band | None, *, backward: bool) -> str | None:
        """Why cuDNN computes no such tiles, or None."""
        return next(refusals(self._given, dtype, widths, band, backward=backward), None)

    def unfit(self, arrays: Sequence[DeviceArray], band: Band | None) -> str | None:
        """Why it cannot compute this tile of a kind that it does not refuse, or None. `arrays`: q, k, v (and dout)."""
        return next(misfits(self._given, arrays, band, most_scores=self._most_scores), None)

    def attend(self, operands: Forward, band: Band | None, scale: float, stream: Stream) -> None:
        """Queue one tile forward. Raises DeviceError where cuDNN cannot."""
        self._follow(stream)
        lse = self._per_row(operands.lse, stream, read=False)
        self._run((*operands[:4], lse), operands[:3], band, scale, stream)
        if lse is not operands.lse:
            self._state.copy(operands.lse, lse, stream)

    def attend_backward(self, operands: Backward, band: Band | None, scale: float, stream: Stream) -> None:
        """Queue one tile backward, by so many heads at a time as the limit on score gradients allows. Raises DeviceError where
        cuDNN cannot.
        """
        for share in shares_of(operands, self._most_scores if stores_scores(self._given) else None):
            self._share_backward(share, band, scale, stream)

    def _share_backward(self, operands: Backward, band: Band | None, scale: float, stream: Stream) -> None:
        self._follow(stream)
        dout = operands.dout
        dtype = dout.dtype.name
        nbytes = dout.size * ITEMSIZE[dtype]
        target = self._stand_in.of(nbytes, stream)[:nbytes].view(numpy_dtype(dtype)).reshape(dout.shape)
        self._state.stand_in(dout, operands.delta, target, stream)
        lse = self._per_row(operands.lse, stream, read=True)
        if lse is not operands.lse:
            self._state.copy(lse, operands.lse, stream)
        given = (*operands[:3], target, dout, lse, *operands[6:])
        self._run(given, operands[:4], band, scale, stream)

    def _per_row(self, lse: DeviceArray, stream: Stream, *, read: bool) -> DeviceArray:
        """Where cuDNN reads or writes lse: there, or in scratch where its address or strides are not what cuDNN takes them for.

        cuDNN is told that each operand begins at a multiple of 16 bytes and does not look; rows of a striped tile begin anywhere.
        """
        packed = lse.flags.c_contiguous or not read or self._given.version >= LSE_READ_WITH_STRIDES
        if packed and address_of(lse) % ALIGNMENT == 0:
            return lse
        return self._lse.of(lse.nbytes, stream)[: lse.nbytes].view(lse.dtype).reshape(lse.shape)

    def _run(
        self, operands: Sequence[DeviceArray], inputs: Sequence[DeviceArray], band: Band | None, scale: float, stream: Stream
    ) -> None:
        """Queue the plan of these operands; `inputs` are those that `unfit` looks at."""
        bounds = bounds_of(band)
        if bounds is None:
            raise DeviceError(f"a tile that cuDNN does not compute: {band} has no bounds on i - j that include 0")
        problem = Problem(operands[0].dtype.name, tuple(map(layout_of, operands)), *bounds, float(scale))
        if problem not in self._plans:
            self._plans[problem] = self._planned(problem, inputs, band)
        plan = self._plans[problem]
        addresses = [address_of(one) for one in operands]
        for name, at in zip(problem.names, addresses, strict=True):
            if at % ALIGNMENT:
                raise DeviceError(f"cuDNN wants {name} at a multiple of {ALIGNMENT} bytes, not at {at:#x}")
        self._follow(stream)
        workspace = address_of(self._workspace.of(plan.workspace_nbytes, stream)) if plan.workspace_nbytes else 0
        execute(self._cudnn, plan, addresses, workspace, self._handle)

    def _planned(self, problem: Problem, inputs: Sequence[DeviceArray], band: Band | None) -> Plan:
        widths, backward = (inputs[0].shape[3], inputs[2].shape[3]), problem.names is BACKWARD
        reason = self.refuses(problem.dtype, widths, band, backward=backward) or self.unfit(inputs, band) or problem.misaligned()
        if reason is not None:
            raise DeviceError(f"a tile that cuDNN does not compute ({problem}): {reason}")
        return build(self._cudnn, problem, {"handle": self._handle}, self._limit(problem))

    def _limit(self, problem: Problem) -> int | None:
        """The limit on score gradients, where cuDNN's frontend heeds one."""
        heeds = self._given.capability[0] == 9 and self._given.version >= ORDERED_DQ and problem.names is BACKWARD
        return self._most_scores if heeds else None

    def _follow(self, stream: Stream) -> None:
        """What cuDNN does next comes on `stream`; its workspace passes from the last one by an event."""
        if stream is self._stream:
            return
        if self._stream is not None:
            self._calls.wait(stream, self._calls.record(self._stream))
        self._cudnn.set_stream(self._handle, getattr(stream, "ptr", stream))
        self._stream = stream
