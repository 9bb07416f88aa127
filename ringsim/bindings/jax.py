"""Ring attention in JAX's autodiff: a call with a vjp of its own, under jit and without.

Ranks must meet in the same calls, in the same order. ``jax.pure_callback`` promises neither: XLA may leave out, repeat or
interchange what it takes for pure. So the collectives are ``jax.experimental.io_callback(ordered=True)``: each takes and returns
the one token of ordered effects, which JAX threads through the whole program and from one dispatched program to the next. What
orders the calls is thereby a dependence of data that XLA sees, made in the order of the trace (backward: the reverse of it), and
a side effect that it keeps even where the result is unused. docs/autograd.md has an example.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..attention import RingAttention, Saved
from ..dtypes import accumulator, numpy_dtype
from ..errors import ArrayError, MissingDependency
from .threads import check_threads

try:
    import jax
    from jax.experimental import io_callback
except ImportError as error:
    raise MissingDependency(f"jax cannot be imported ({error}): pip install 'ringsim[jax]'") from error

Array = npt.NDArray[Any]


def attention(plan: RingAttention, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of the local shards under `plan`, to be differentiated in reverse mode: this rank's rows of the output.

    q is (batch, local seq, heads, head_dim), k and v have kv_heads, and v and what is returned v_head_dim; all without the batch
    if the workload has one sequence. CPU arrays in the dtype of the workload; float64 needs ``jax_enable_x64``. The call is
    collective, and so is its backward: every rank traces the same program, with the same calls differentiated. Order: calls run
    one at a time in the order in which they were traced, their backwards in the reverse of it, none left out and none repeated;
    between a call of the plan itself and one from here the order is the caller's: ``jax.effects_barrier()`` waits for the
    latter. One plan serves any number of layers and the steps of ``lax.scan``. Callbacks may run on a thread of XLA: MPI must
    allow it.
    Raises ArrayError where a shape or dtype does not fit the plan, TransportError where MPI allows calls from one thread alone.
    What the plan raises while running (RankMismatch, PeerTimeout) comes out as JAX's own error, with ringsim's in its text. JAX
    refuses jax.vmap, jax.checkpoint, jvp and second derivatives of it, by errors of its own. FlashAttention-2, arXiv 2307.08691,
    algorithm 2.
    """
    check_threads(plan, "JAX")
    packed = _check_arrays(plan, {"q": q, "k": k, "v": v})
    out: jax.Array = _attention(_Forward(plan, packed), q, k, v)
    return out


@dataclass(frozen=True, slots=True)
class _Forward:
    """What runs on the host; equal for the same plan, so that JAX compiles it once."""

    plan: RingAttention
    packed: bool

    def made(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of out and lse."""
        dtype, shapes = self.plan.schedule.workload.dtype, self.plan.shapes
        batch, rows, heads, _ = shapes["q"]
        made = (shapes["out"], dtype), ((batch, heads, rows), accumulator(dtype))
        return tuple(jax.ShapeDtypeStruct(shape[self.packed :], numpy_dtype(name)) for shape, name in made)

    def __call__(self, q: Any, k: Any, v: Any) -> tuple[Array, Array]:
        made = self.plan.with_lse(*(np.asarray(array) for array in (q, k, v)))
        # they may be XLA's memory, which lasts as long as this call
        self.plan.saved = None
        return made


@dataclass(frozen=True, slots=True)
class _Backward:
    """As `_Forward`."""

    plan: RingAttention

    def __call__(self, dout: Any, *saved: Any) -> tuple[Array, Array, Array]:
        return self.plan.backward(np.asarray(dout), Saved(*(np.asarray(array) for array in saved)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(host: _Forward, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _forward(host, q, k, v)[0]


def _forward(host: _Forward, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, lse = io_callback(host, host.made(), q, k, v, ordered=True)
    return out, (q, k, v, out, lse)


def _backward(host: _Forward, saved: tuple[jax.Array, ...], dout: jax.Array) -> tuple[jax.Array, ...]:
    made = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in saved[:3])
    gradients: tuple[jax.Array, ...] = io_callback(_Backward(host.plan), made, dout, *saved, ordered=True)
    return gradients


_attention.defvjp(_forward, _backward)


def _check_arrays(plan: RingAttention, given: dict[str, Any]) -> bool:
    """Whether q, k and v come without the batch. Raises ArrayError unless they fit the plan."""
    dtype, shapes = plan.schedule.workload.dtype, plan.shapes
    packed = shapes["q"][0] == 1 and all(array.ndim == 3 for array in given.values())
    for name, array in given.items():
        shape = shapes[name][packed:]
        if array.shape == shape and array.dtype == numpy_dtype(dtype):
            continue
        hint = ""
        if dtype == "float64" and not jax.config.jax_enable_x64:
            hint = "; jax.config.update('jax_enable_x64', True) makes JAX use float64"
        raise ArrayError(f"{name} is {array.dtype.name}{array.shape}; the plan expects {dtype}{shape}{hint}")
    return packed
