"""Partial outputs in device memory: scratch for them, and the kernels that fold them into their state."""

from __future__ import annotations

from ringsim.backends.cuda import Calls, DeviceArray, Stream
from ringsim.backends.cuda_state import StateKernels
from ringsim.dtypes import ITEMSIZE, numpy_dtype
from ringsim.partials import Ledger, Pending, aligned


class Partials:
    """The ledger of one stream: what is taken here may be what kernels queued before still use."""

    def __init__(self, calls: Calls, kernels: StateKernels, stream: Stream) -> None:
        self._kernels = kernels
        self._stream = stream
        self.ledger: Ledger[DeviceArray] = Ledger(calls.empty)

    def room(self, pending: Pending[DeviceArray], shape: tuple[int, ...], dtype: str) -> tuple[DeviceArray, DeviceArray]:
        """Room for a partial: out (batch, rows, heads, v_head_dim) in `dtype`, and lse (batch, heads, rows)."""
        batch, rows, heads, width = shape
        statistics = pending.state[1].dtype
        nbytes, beside = batch * rows * heads * width * ITEMSIZE[dtype], batch * rows * heads * statistics.itemsize
        # one pass takes partials of one dtype: those of another fused kernel may have another
        other = bool(pending.partials) and pending.partials[-1].out.dtype != numpy_dtype(dtype)
        if other or self.ledger.full(pending, nbytes, ITEMSIZE[dtype]):
            self.fold(pending)
        memory = self.ledger.room(pending, nbytes, beside)
        out = memory[:nbytes].view(numpy_dtype(dtype)).reshape(batch, rows, heads, width)
        first = aligned(nbytes)
        return out, memory[first : first + beside].view(statistics).reshape(batch, heads, rows)

    def fold(self, pending: Pending[DeviceArray]) -> None:
        """Bring the state up to date."""
        if pending.fresh or pending.partials:
            self._kernels.merge_partials(pending.state, pending.fresh, pending.partials, self._stream)
        self.ledger.empty(pending)

    def finish(self, pending: Pending[DeviceArray], out: DeviceArray, lse: DeviceArray) -> None:
        """Write out and lse of the state, which is not written itself and is of no more use."""
        self._kernels.finish_partials(pending.state, pending.fresh, pending.partials, out, lse, self._stream)
        self.ledger.close(pending)
