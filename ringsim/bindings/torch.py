"""Ring attention in PyTorch's autograd: a call in the graph, whose backward is the plan's.

Torch runs the backward of CPU tensors on the thread that asks for it, that of CUDA tensors on one thread for each device, last
call first: ranks that built the same graph meet in the same order. docs/autograd.md has an example.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..attention import RingAttention, Saved
from ..errors import ArrayError, MissingDependency, WorkloadError
from .threads import check_threads

try:
    import torch
except ImportError as error:
    raise MissingDependency(f"torch cannot be imported ({error}): pip install 'ringsim[torch]'") from error


def attention(plan: RingAttention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of the local shards under `plan`, in the autograd graph: this rank's rows of the output, a new tensor.

    q is (batch, local seq, heads, head_dim), k and v have kv_heads, and v and what is returned v_head_dim; all without the batch
    if the workload has one sequence. Tensors in the dtype of the workload where the plan's backend computes: on the CPU with any
    strides, on its CUDA device on torch's current stream. The call is collective, and so is its backward: on every rank the same
    calls need gradients, and all ranks go back through them. One plan serves any number of layers, since a call keeps what its
    backward needs (q, k, v, out and lse) in the graph and not in the plan. Works under torch.utils.checkpoint, which calls again;
    under torch.compile call ``torch.compiler.disable(attention)``.
    Raises ArrayError for what is no dense tensor, WorkloadError for a second derivative, forward mode and vmap, TransportError
    where MPI may not be called by the backward of CUDA tensors, and what a call of the plan raises, at once or out of
    ``backward``: a tensor that does not fit or lies on a device is a RankMismatch on every rank. FlashAttention-2, arXiv
    2307.08691, algorithm 2.
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise ArrayError(f"{name} is {getattr(value, 'layout', type(value).__name__)}; expected a dense torch tensor")
    if q.is_cuda:
        check_threads(plan, "torch's backward of CUDA tensors")
    out: torch.Tensor = _Attention.apply(plan, q, k, v)[0]
    return out


class _Attention(torch.autograd.Function):
    """(out, lse) of (plan, q, k, v); lse has no gradient."""

    @staticmethod
    def forward(plan: RingAttention, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (out,) = _room(plan, inputs[0], ("out",))
        _, lse = plan.with_lse(*(tensor.detach() for tensor in inputs), out=out, stream=_stream(inputs[0]))
        # the graph keeps what this call needs, for as long as it needs it
        plan.saved = None
        return out, _tensor(lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.plan, ctx.call = inputs[0], inputs[0].calls
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        made = _Gradients.apply(ctx.plan, ctx.call, dout, *ctx.saved_tensors)
        return None, *(tensor if needed else None for tensor, needed in zip(made, ctx.needs_input_grad[1:], strict=True))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise WorkloadError("ring attention has no forward-mode derivative here; use reverse mode: backward, torch.func.vjp")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        raise WorkloadError(
            "ring attention cannot run under vmap, since each call is a collective over the ranks; "
            "give the axis that is mapped as the first of q, k and v, and `batch` to the workload"
        )


class _Gradients(torch.autograd.Function):
    """(dq, dk, dv) of (plan, number of the call, dout, q, k, v, out, lse).

    A function of its own, so that only differentiating it is an error.
    """

    @staticmethod
    def forward(plan: RingAttention, call: int, dout: torch.Tensor, *saved: torch.Tensor) -> tuple[torch.Tensor, ...]:
        arrays: list[Any] = [tensor.detach() for tensor in saved]
        dq, dk, dv = _room(plan, dout, ("q", "k", "v"))
        plan.backward(dout.detach(), Saved(*arrays).of_call(call), dq=dq, dk=dk, dv=dv, stream=_stream(dout))
        return dq, dk, dv

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Nothing to keep: there is no second derivative."""

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise WorkloadError("the gradients of ring attention have no derivative here: there is no second derivative")

    vmap = _Attention.vmap


def _room(plan: RingAttention, like: torch.Tensor, names: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    """Tensors shaped as these arrays of the plan, where `like` lies, without the batch if it has none.

    Of torch's own memory: its allocator counts them, and knows the streams that they are recorded on.
    """
    dtype = getattr(torch, plan.schedule.workload.dtype)
    shapes = (plan.shapes[name][like.ndim == 3 :] for name in names)
    return tuple(torch.empty(shape, dtype=dtype, device=like.device) for shape in shapes)


def _stream(tensor: torch.Tensor) -> Any:
    """The stream that a tensor's work is queued on; None on the CPU."""
    return torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """The array as a tensor that shares its memory; not every bfloat16 is taken by torch, so it crosses as 16-bit integers."""
    take = torch.from_numpy if isinstance(array, np.ndarray) else torch.from_dlpack
    if array.dtype.name == "bfloat16":
        return take(array.view(np.int16)).view(torch.bfloat16)
    return take(array)
