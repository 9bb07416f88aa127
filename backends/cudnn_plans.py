"""cuDNN's graphs: one for each shape of tile, built into a plan once; and the library that builds them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from ringsim.backends.cuda import INSTALL, DeviceArray
from ringsim.backends.cudnn_limits import ALIGNMENT, spelled
from ringsim.dtypes import ITEMSIZE
from ringsim.errors import DeviceError, MissingDependency

FORWARD: Final = ("q", "k", "v", "out", "lse")
BACKWARD: Final = ("q", "k", "v", "o", "dout", "lse", "dq", "dk", "dv")
SCORES_LIMIT: Final = "CUDNN_FRONTEND_ATTN_DP_WORKSPACE_LIMIT"
"""Read by the frontend when it expands a backward graph on Hopper: beyond so many bytes of score gradients, dQ is summed in
order instead (`CompositeSDPABackwardNode::expand_node`; cuDNN 9.25).
"""
_ENVIRONMENT = threading.Lock()


class Layout(NamedTuple):
    """Shape and strides (in elements) of an operand as cuDNN counts its axes: (batch, heads, rows, width)."""

    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]


def layout_of(array: DeviceArray) -> Layout:
    """Of (batch, rows, heads, width) or, for one number a row, of (batch, heads, rows)."""
    sizes = [int(size) for size in array.shape]
    strides = [int(stride) // int(array.itemsize) for stride in array.strides]
    if len(sizes) == 3:
        sizes, strides = [*sizes, 1], [*strides, 1]
    # the stride of an axis of length 1 means nothing: a dense one stands for it, so that equal layouts are equal
    for axis in (2, 1, 0):
        if sizes[axis] == 1:
            strides[axis] = sizes[axis + 1] * strides[axis + 1]
    order = (0, 1, 2, 3) if array.ndim == 3 else (0, 2, 1, 3)
    return Layout(_four(sizes[axis] for axis in order), _four(strides[axis] for axis in order))


def _four(numbers: Iterable[int]) -> tuple[int, int, int, int]:
    batch, heads, rows, width = numbers
    return batch, heads, rows, width


class Problem(NamedTuple):
    """What a plan depends on. `layouts` are those of `FORWARD` or of `BACKWARD`; left and right are cuDNN's bounds."""

    dtype: str
    layouts: tuple[Layout, ...]
    left: int | None
    right: int | None
    scale: float

    @property
    def names(self) -> tuple[str, ...]:
        """Of the operands, in order."""
        return BACKWARD if len(self.layouts) == len(BACKWARD) else FORWARD

    def misaligned(self) -> str | None:
        """The operand whose strides cuDNN's vector loads cannot follow, and why; or None."""
        for name, (shape, strides) in zip(self.names, self.layouts, strict=True):
            steps = [stride * ITEMSIZE[self.dtype] for stride, count in zip(strides[:3], shape[:3], strict=True) if count > 1]
            if name != "lse" and any(step % ALIGNMENT for step in steps):
                return f"{name} has strides of {steps} bytes, not all multiples of {ALIGNMENT}"
        return None

    def __str__(self) -> str:
        """For messages and reports."""
        shapes = ", ".join(f"{name} {layout.shape}" for name, layout in zip(self.names[:3], self.layouts, strict=False))
        sense = "backward" if self.names is BACKWARD else "forward"
        return f"{sense} {self.dtype}, {shapes} (batch, heads, rows, width), left bound {self.left}, right bound {self.right}"


class Plan(NamedTuple):
    """A graph that is built: cuDNN's name for its engine, and the workspace that it needs."""

    graph: Any
    engine: str
    workspace_nbytes: int


def load() -> Any:
    """The module cudnn, with cuDNN itself. Raises MissingDependency."""
    try:
        import cudnn
    except ImportError as error:
        raise MissingDependency(f"cuDNN's attention needs its frontend, which cannot be imported ({error}): {INSTALL}") from error
    try:
        cudnn.backend_version()
    except RuntimeError as error:
        raise MissingDependency(
            f"the cuDNN frontend {cudnn.__version__} finds no libcudnn.so.9 ({error}) and brings none: {INSTALL}"
        ) from error
    return cudnn


def versions(cudnn: Any) -> dict[str, str]:
    """Of cuDNN and of its frontend."""
    return {"cudnn": spelled(cudnn.backend_version()), "cudnn_frontend": str(cudnn.__version__)}


@contextmanager
def scores_limit(nbytes: int | None) -> Iterator[None]:
    """Within: the most bytes of score gradients, where the user has not set it (None: left alone)."""
    if nbytes is None or SCORES_LIMIT in os.environ:
        yield
        return
    with _ENVIRONMENT:
        os.environ[SCORES_LIMIT] = str(nbytes)
        try:
            yield
        finally:
            os.environ.pop(SCORES_LIMIT, None)


def build(cudnn: Any, problem: Problem, options: dict[str, Any], limit: int | None = None) -> Plan:
    """The first plan of cuDNN's heuristics that can be built; `options` (``handle``) are the graph's. Raises DeviceError."""
    declined: list[str] = []
    try:
        with scores_limit(limit):
            graph = graph_of(cudnn, problem, options)
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
            for index in range(graph.get_execution_plan_count()):
                plan = _built(cudnn, graph, index, declined)
                if plan is not None:
                    return plan
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError) as error:
        declined.append(str(error))
    said = " and ".join(f"{name} {version}" for name, version in versions(cudnn).items())
    raise DeviceError(f"{said} has no plan for attention {problem}: {'; '.join(declined) or 'no engine'}")


def _built(cudnn: Any, graph: Any, index: int, declined: list[str]) -> Plan | None:
    """The plan at an index, or None where it cannot be built.

    The frontend's own engines, compiled from Python with CuTe, are passed over: cuDNN's are called eng<number>.
    """
    name = str(graph.get_plan_name_at_index(index))
    if not name.startswith("eng"):
        declined.append(f"{name}: not one of cuDNN's own engines")
        return None
    try:
        graph.build_plan_at_index(index)
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
        declined.append(f"{name}: {error}")
        return None
    return Plan(graph, name, int(graph.get_workspace_size_plan_at_index(index)))


def graph_of(cudnn: Any, problem: Problem, options: dict[str, Any]) -> Any:
    """The graph of a problem; operand n of `problem.names` has uid n + 1."""
    half = cudnn.data_type.HALF if problem.dtype == "float16" else cudnn.data_type.BFLOAT16
    single = cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=half, intermediate_data_type=single, compute_data_type=single, **options)
    inputs = FORWARD[:3] if problem.names is FORWARD else BACKWARD[:6]
    made = {}
    for n, (name, layout) in enumerate(zip(inputs, problem.layouts, strict=False)):
        kind = single if name == "lse" else half
        made[name] = graph.tensor(name=name, uid=n + 1, dim=layout.shape, stride=layout.strides, data_type=kind)
    band = {
        "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
        "diagonal_band_left_bound": problem.left,
        "diagonal_band_right_bound": problem.right,
    }
    given = {"q": made["q"], "k": made["k"], "v": made["v"], "attn_scale": problem.scale, **band}
    if problem.names is FORWARD:
        results = graph.sdpa(name="attend", generate_stats=True, **given)
    else:
        given |= {"o": made["o"], "dO": made["dout"], "stats": made["lse"]}
        results = graph.sdpa_backward(name="attend_backward", use_deterministic_algorithm=True, **given)
    for n, result in enumerate(results, start=len(inputs)):
        layout = problem.layouts[n]
        result.set_output(True).set_uid(n + 1).set_dim(layout.shape).set_stride(layout.strides)
        result.set_data_type(single if problem.names[n] == "lse" else half)
    return graph


def execute(cudnn: Any, plan: Plan, addresses: Sequence[int], workspace: int, handle: Any) -> None:
    """Queue a plan on the handle's stream. Raises DeviceError."""
    try:
        plan.graph.execute({n + 1: one for n, one in enumerate(addresses)}, workspace, handle=handle)
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError) as error:
        raise DeviceError(f"cuDNN {spelled(cudnn.backend_version())}, engine {plan.engine}: {error}") from error
