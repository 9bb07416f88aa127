"""Checking a run: each rank's rows against dense attention in float64."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from . import inputs
from .dtypes import ITEMSIZE, numpy_dtype
from .errors import WorkloadError
from .reference import dense_backward, dense_rows
from .schedule import Block, Schedule
from .transport import Transport
from .workload import Workload

Array = npt.NDArray[Any]
LIMITS = {"float64": 1e-12, "float32": 2e-6}
MOST_PAIRS = 2**27
MOST_NBYTES = 2**32
GRADIENT_LIMITS = {"float64": 1e-10, "float32": 2e-5}
MOST_GRADIENT_PAIRS = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The largest error over all checked rows, and the limit: of out absolute, of gradients relative to large entries."""

    error: float
    limit: float
    rows: int
    of_rows: int
    what: str = "out"

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit (NaN is not)."""
        return self.error <= self.limit

    def sentence(self) -> str:
        """The verdict for people."""
        some = f"all {self.rows} rows" if self.rows == self.of_rows else f"{self.rows} of {self.of_rows} rows, sampled"
        verdict = "right" if self.passed else "WRONG"
        size = "error" if self.what == "out" else "relative error"
        of = "" if self.what == "out" else f" of {self.what}"
        return f"check: {verdict}: largest {size}{of} {self.error:.2e} (limit {self.limit:.2e}) against dense float64, {some}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"passed": self.passed}


def check_size(workload: Workload) -> None:
    """Raise WorkloadError where K and V of the whole sequence outgrow 4 GiB, or gradients take too many pairs."""
    pairs = workload.batch * workload.heads * workload.q_len * workload.kv_len
    if workload.pass_ != "forward" and pairs > MOST_GRADIENT_PAIRS:
        raise WorkloadError(
            f"--check of gradients computes every query with every key, {pairs:.3g} pairs; at most {MOST_GRADIENT_PAIRS:.3g} are "
            "allowed: use fewer heads or sequences, or shorter ones"
        )
    width = workload.kv_heads * (workload.head_dim + workload.v_head_dim)
    nbytes = workload.batch * workload.kv_len * width * ITEMSIZE[workload.dtype]
    if nbytes > MOST_NBYTES:
        raise WorkloadError(
            f"--check needs K and V of the whole sequence on each rank, {nbytes / 2**30:.1f} GiB; use a shorter one"
        )


def check(transport: Transport, schedule: Schedule, q: npt.NDArray[Any], out: npt.NDArray[Any], seed: int) -> Check:
    """Compare this rank's `out` with dense attention over the whole sequence; collective, the same result on every rank.

    Rows are sampled where all would take too long. float64 within 1e-12, float32 within 2e-6; half precision within 2.5
    times the rounding error of the dense result plus 2e-3. Raises WorkloadError where K and V outgrow 4 GiB.
    """
    work = schedule.workload
    check_size(work)
    positions = schedule.job.q_partition.positions(transport.rank)
    most = max(1, MOST_PAIRS // max(1, work.kv_len * work.heads * work.batch * schedule.world_size))
    rows = np.arange(len(positions))
    if len(rows) > most:
        rows = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
    k, v = (inputs.rows(work, name, np.arange(work.kv_len), seed) for name in ("k", "v"))
    dense, _ = dense_rows(work, positions[rows], q[:, rows], k, v)
    error = float(np.max(np.abs(dense - out[:, rows].astype(np.float64)), initial=0.0))
    rounding = float(np.max(np.abs(dense - dense.astype(out.dtype).astype(np.float64)), initial=0.0))
    said = transport.allgather((error, rounding, len(rows), len(positions)))
    limit = LIMITS.get(work.dtype, 2.5 * max(entry[1] for entry in said) + 2e-3)
    largest = float(np.max([entry[0] for entry in said]))
    return Check(error=largest, limit=limit, rows=sum(entry[2] for entry in said), of_rows=sum(entry[3] for entry in said))


def check_gradients(transport: Transport, schedule: Schedule, gradients: tuple[Array, Array, Array], seed: int) -> Check:
    """Compare this rank's dq, dk and dv with dense ones of the whole sequence; collective, the same result on every rank.

    Errors are relative to the largest entry of a head's gradient, or to 1 where that is less: float64 within 1e-10, float32
    within 2e-5, half precision within 2.5 times the rounding error of the dense one plus 2e-3. Each rank computes the dense
    gradients of some key/value heads.
    """
    work, job = schedule.workload, schedule.job
    check_size(work)
    shards = transport.allgather(gradients)
    error = rounding = 0.0
    for head in range(transport.rank, work.kv_heads, transport.world_size):
        for name, dense in zip(("dq", "dk", "dv"), _dense_of_head(work, head, seed), strict=True):
            # with a key alone dq and dk cancel: what is left is rounding
            largest = max(float(np.max(np.abs(dense), initial=0.0)), 1.0)
            heads = slice(head, head + 1) if name != "dq" else slice(*job.q_heads(Block(0, (0, 0), (head, head + 1))))
            for rank, parts in enumerate(shards):
                found = parts[("dq", "dk", "dv").index(name)][:, :, heads].astype(np.float64)
                wanted = dense[:, (job.q_partition if name == "dq" else job.kv_partition).positions(rank)]
                error = _larger(error, found - wanted, largest)
                rounding = _larger(rounding, wanted.astype(numpy_dtype(work.dtype)).astype(np.float64) - wanted, largest)
    said = transport.allgather((error, rounding))
    limit = GRADIENT_LIMITS.get(work.dtype, 2.5 * max(entry[1] for entry in said) + 2e-3)
    return Check(
        error=float(np.max([entry[0] for entry in said])), limit=limit, rows=work.q_len, of_rows=work.q_len, what="dq, dk, dv"
    )


def _larger(most: float, difference: Array, scale: float) -> float:
    """The larger of both, NaN if either is."""
    return float(np.maximum(most, np.max(np.abs(difference), initial=0.0) / scale))


def _dense_of_head(work: Workload, head: int, seed: int) -> tuple[Array, Array, Array]:
    """Dense gradients of one key/value head and the query heads that share it."""
    group = work.heads // work.kv_heads
    one = replace(work, heads=group, kv_heads=1, pass_="forward")
    names = {"dout": (work.q_len, group), "q": (work.q_len, group), "k": (work.kv_len, 1), "v": (work.kv_len, 1)}
    arrays = [
        inputs.rows(work, name, np.arange(rows), seed)[:, :, head * count : (head + 1) * count]
        for name, (rows, count) in names.items()
    ]
    return dense_backward(one, *arrays)
