"""Checking a run: each rank's rows against dense attention in float64."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import inputs
from .dtypes import ITEMSIZE
from .errors import WorkloadError
from .reference import dense_rows
from .schedule import Schedule
from .transport import Transport
from .workload import Workload

LIMITS = {"float64": 1e-12, "float32": 2e-6}
MOST_PAIRS = 2**27
MOST_NBYTES = 2**32


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The largest absolute error over all ranks' checked rows, and the limit for it."""

    error: float
    limit: float
    rows: int
    of_rows: int

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit (NaN is not)."""
        return self.error <= self.limit

    def sentence(self) -> str:
        """The verdict for people."""
        some = f"all {self.rows} rows" if self.rows == self.of_rows else f"{self.rows} of {self.of_rows} rows, sampled"
        verdict = "right" if self.passed else "WRONG"
        return f"check: {verdict}: largest error {self.error:.2e} (limit {self.limit:.2e}) against dense float64, {some}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"passed": self.passed}


def check_size(workload: Workload) -> None:
    """Raise WorkloadError where K and V of the whole sequence outgrow 4 GiB."""
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
