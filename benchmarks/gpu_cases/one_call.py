"""One fused call of cuDNN over all keys, made as its users make it: what a rank of a ring is measured against."""

from __future__ import annotations

from typing import Any

from ringsim.backends.cuda import Calls, DeviceArray, Stream
from ringsim.backends.cuda_strides import address_of
from ringsim.backends.cuda_tiles import Band
from ringsim.backends.cudnn_limits import bounds_of
from ringsim.backends.cudnn_plans import Plan, Problem, build, execute, layout_of, load
from ringsim.errors import DeviceError

from .card import Operands

SCORES_NBYTES = 1 << 30
"""Of score gradients that a deterministic backward pass may store, as CudnnTiles allows."""


class _AnyOrder:
    """The module cudnn, whose backward graphs need not be deterministic."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def pygraph(self, **options: Any) -> Any:
        """A graph that asks for any order of sums."""
        graph = self._module.pygraph(**options)
        made = graph.sdpa_backward

        def any_order(**given: Any) -> Any:
            return made(**given | {"use_deterministic_algorithm": False})

        return _Graph(graph, any_order)


class _Graph:
    """A graph with another `sdpa_backward`."""

    def __init__(self, graph: Any, sdpa_backward: Any) -> None:
        self._graph = graph
        self.sdpa_backward = sdpa_backward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)


class CudnnCall:
    """`OneCall`: plans and workspace are made at the first call of a problem. Raises DeviceError where cuDNN has no plan."""

    def __init__(self, calls: Calls, *, ordered: bool) -> None:
        module = load()
        self._cudnn = module if ordered else _AnyOrder(module)
        self._calls = calls
        self._handle = module.create_handle()
        self._set_stream = module.set_stream
        self._plans: dict[Problem, tuple[Plan, DeviceArray | None]] = {}

    def forward(self, operands: Operands, band: Band | None, scale: float, stream: Stream) -> None:
        """One launch of cuDNN's."""
        self._run(operands[:5], band, scale, stream)

    def backward(self, operands: Operands, band: Band | None, scale: float, stream: Stream) -> None:
        """One launch of cuDNN's, of out itself."""
        q, k, v, out, lse, dout, dq, dk, dv = operands
        self._run((q, k, v, out, dout, lse, dq, dk, dv), band, scale, stream)

    def _run(self, arrays: tuple[DeviceArray, ...], band: Band | None, scale: float, stream: Stream) -> None:
        bounds = bounds_of(band)
        if bounds is None:
            raise DeviceError(f"cuDNN has no bounds for {band}")
        problem = Problem(arrays[0].dtype.name, tuple(map(layout_of, arrays)), *bounds, float(scale))
        if problem not in self._plans:
            plan = build(self._cudnn, problem, {"handle": self._handle}, SCORES_NBYTES)
            self._plans[problem] = plan, self._calls.empty(plan.workspace_nbytes) if plan.workspace_nbytes else None
        plan, workspace = self._plans[problem]
        self._set_stream(self._handle, getattr(stream, "ptr", stream))
        addresses = [address_of(one) for one in arrays]
        execute(self._cudnn, plan, addresses, 0 if workspace is None else address_of(workspace), self._handle)

    def facts(self) -> list[str]:
        """The engine and workspace of each plan."""
        return [
            f"{problem}: {plan.engine}, workspace {plan.workspace_nbytes} bytes" for problem, (plan, _) in self._plans.items()
        ]
