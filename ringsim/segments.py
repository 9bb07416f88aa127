"""What a message costs, piece by piece: a latency and a bandwidth for each range of sizes, fitted to measured times.

MPI libraries change protocol with the size of a message (eager, rendezvous, pipelined), and each has a line of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .errors import CalibrationError
from .units import parse, shown

Array = npt.NDArray[Any]
LEAST_POINTS: Final = 2
MOST_POINTS: Final = 256
"""Of one table: the fit takes time and memory by their square."""
MOST_NBYTES: Final = 2**53
"""Of one message: up to here a float holds every size."""
LEAST_S, MOST_S = 1e-12, 1e6
ROUNDING: Final = 1e-12
"""Of a time: less is no finding."""

_TITLE: Final = re.compile(r"#\s*OSU\b.*\bTest\b", re.IGNORECASE)
_LATENCY_TITLE: Final = re.compile(r"#\s*OSU\s+\S+\s+Latency\s+Test\b", re.IGNORECASE)
_HEADER: Final = re.compile(r"#\s*Size\b", re.IGNORECASE)
_LATENCY_HEADER: Final = re.compile(r"#\s*Size\s+(Avg\s+)?Lat(ency)?\s*\(us\)", re.IGNORECASE)
_ROW: Final = re.compile(r"([0-9]{1,19})\s+([0-9]{1,19}(?:\.[0-9]{1,19})?)(?:\s.*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A message of n bytes, from `from_nbytes` up to where the next segment begins, takes latency + n / bandwidth.

    `bandwidth_bytes_per_s` is infinite where the time does not grow with the size.
    """

    from_nbytes: int
    latency_s: float
    bandwidth_bytes_per_s: float


def fit(points: Sequence[tuple[int, float]], segments: int) -> tuple[Segment, ...]:
    """The best piecewise line of at most `segments` pieces through `points` of (bytes, seconds), sizes increasing.

    Least squares of the relative error, over all lines with latency >= 0 and slope >= 0 (Hockney 1994) and all cuts with two
    points or more in each piece (dynamic programming, Bellman 1961). A piece begins at its first point, the first one at 0; one
    point alone is a latency. Fewer pieces come back where another cut gains nothing. Raises CalibrationError.
    """
    _check_table(points, segments)
    nbytes, seconds = (np.array(column, float) for column in zip(*points, strict=True))
    # squares, in lines and cuts alike: absolute errors fit a table closer, yet predict left-out sizes no better and miss by more
    costs = _costs(nbytes, seconds)
    totals, cuts = [costs[0]], []
    for _ in range(segments - 1):
        ways = totals[-1][:, None] + costs
        cuts.append(ways.argmin(axis=0))
        totals.append(ways.min(axis=0))
    used = int(np.argmin([total[-1] for total in totals]))
    bounds = [len(points)]
    for cut in reversed(cuts[:used]):
        bounds.insert(0, int(cut[bounds[0]]))
    found = []
    for start, end in zip([0, *bounds], bounds, strict=False):
        latency_s, per_byte_s = _line(nbytes[start:end], seconds[start:end])
        bandwidth = 1.0 / per_byte_s if per_byte_s else math.inf
        found.append(
            Segment(from_nbytes=int(points[start][0]) if start else 0, latency_s=latency_s, bandwidth_bytes_per_s=bandwidth)
        )
    return tuple(found)


def predict(segments: Sequence[Segment], nbytes: int) -> float:
    """Seconds that a message of `nbytes` takes; the last segment has no end. Raises CalibrationError if none holds it."""
    holding = [segment for segment in segments if segment.from_nbytes <= nbytes]
    if not holding or not 0 <= nbytes <= MOST_NBYTES:
        begin = min((segment.from_nbytes for segment in segments), default=0)
        raise CalibrationError(
            f"no segment holds a message of {shown(nbytes)} B: {len(segments)} segments, {begin} to {MOST_NBYTES} B"
        )
    last = max(holding, key=lambda segment: segment.from_nbytes)
    return last.latency_s + nbytes / last.bandwidth_bytes_per_s


def mean_error(segments: Sequence[Segment], points: Sequence[tuple[int, float]]) -> float:
    """Mean absolute relative error of the predicted seconds over `points` (0.02 is 2 %). Raises CalibrationError."""
    if not points:
        raise CalibrationError("no points to compare the segments with: give (bytes, seconds) of one message or more")
    for number, (nbytes, seconds) in enumerate(points, 1):
        _check_point(f"point {number}", nbytes, seconds)
    return sum(abs(predict(segments, nbytes) / seconds - 1) for nbytes, seconds in points) / len(points)


def read_osu(text: str, file: str) -> tuple[tuple[int, float], ...]:
    """The (bytes, seconds) in the output of osu_latency, one-way; `file` is its name in messages. Raises CalibrationError.

    Takes one table, as the OSU Micro-Benchmarks (mvapich.cse.ohio-state.edu/benchmarks) print it, with its header, for that
    names the unit; further columns are left out, and so is size 0: a message without bytes touches no buffer.
    """
    points: list[tuple[int, float]] = []
    in_table = False
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        place = f"{file}:{number}"
        if line.startswith("#"):
            _check_comment(place, line)
            in_table = in_table or _LATENCY_HEADER.match(line) is not None
        elif line:
            nbytes, seconds = _row(place, line)
            if not in_table:
                raise CalibrationError(
                    f"{place}: a row before the header '# Size  Latency (us)', its unit: give all that osu_latency printed"
                )
            if nbytes:
                _check_point(place, nbytes, seconds, before=points[-1][0] if points else 0)
                points.append((nbytes, seconds))
    if not points:
        raise CalibrationError(f"{file}: no row of size and latency: give all that osu_latency printed")
    return tuple(points)


def to_regimes(segments: Sequence[Segment]) -> list[dict[str, str]]:
    """The segments as a topology file writes them, to six digits; no bandwidth is one without limit."""
    regimes = []
    for segment in segments:
        regime = {"from": f"{segment.from_nbytes} B", "latency": f"{segment.latency_s * 1e6:.6g} us"}
        if math.isfinite(segment.bandwidth_bytes_per_s):
            regime["bandwidth"] = f"{segment.bandwidth_bytes_per_s / 1e9:.6g} GB/s"
        regimes.append(regime)
    return regimes


def _check_table(points: Sequence[tuple[int, float]], segments: int) -> None:
    before = 0
    for number, (nbytes, seconds) in enumerate(points, 1):
        _check_point(f"point {number}", nbytes, seconds, before=before)
        before = nbytes
    if len(points) > MOST_POINTS:
        raise CalibrationError(f"{len(points)} points are more than {MOST_POINTS}: leave out sizes that lie close together")
    most = max(len(points) // LEAST_POINTS, min(len(points), 1))
    if not 1 <= segments <= most:
        raise CalibrationError(
            f"{shown(segments)} segments of {len(points)} points: {LEAST_POINTS} points each make at most {most};"
            f" ask for 1 to {most}, or measure more sizes"
            if most
            else "no points to fit: give (bytes, seconds) of one message or more"
        )


def _check_point(place: str, nbytes: int, seconds: float, before: int = 0) -> None:
    if not 1 <= nbytes <= MOST_NBYTES:
        raise CalibrationError(f"{place}: a size of {shown(nbytes)} B; expected 1 to {MOST_NBYTES} B")
    if not LEAST_S <= seconds <= MOST_S:
        raise CalibrationError(f"{place}: {shown(seconds)} s for {nbytes} B; expected {LEAST_S:g} to {MOST_S:g} s")
    if nbytes <= before:
        raise CalibrationError(f"{place}: {nbytes} B after {before} B; sizes increase, each comes once: give one table at a time")


def _check_comment(place: str, line: str) -> None:
    """Raise CalibrationError for the title or the header of another benchmark than osu_latency."""
    title, header = _TITLE.match(line), _HEADER.match(line)
    if (title and "bandwidth" in line.lower()) or (header and re.search("bandwidth|B/s", line, re.IGNORECASE)):
        raise CalibrationError(
            f"{place}: {shown(line)}: a bandwidth test has a window of messages under way at once, so that"
            " bytes / bandwidth is not the time of one; give the output of osu_latency"
        )
    if (title and not _LATENCY_TITLE.match(line)) or (header and not _LATENCY_HEADER.match(line)):
        raise CalibrationError(
            f"{place}: {shown(line)}: expected the latency in us of one message between two ranks; give the output of osu_latency"
        )


def _row(place: str, line: str) -> tuple[int, float]:
    """Bytes and seconds of one row. Raises CalibrationError."""
    match = _ROW.fullmatch(line)
    if match is None:
        raise CalibrationError(f"{place}: {shown(line)}: expected a row of bytes and microseconds such as '8192 7.59'")
    if "Fail" in line.split():
        raise CalibrationError(f"{place}: {shown(line)}: the benchmark found wrong data in this message; measure again")
    return int(match[1]), parse(f"{match[2]} us", "time")


def _costs(nbytes: Array, seconds: Array) -> Array:
    """Squared relative error of the line through points i up to j, at [i, j]; infinite where these are too few."""
    count = len(nbytes)
    costs = np.full((count + 1, count + 1), np.inf)
    for i, j in combinations(range(count + 1), 2):
        if j - i >= min(LEAST_POINTS, count):
            cost = _squared_error(_line(nbytes[i:j], seconds[i:j]), nbytes[i:j], seconds[i:j])
            # equal costs let the fewest and the earliest cuts win, on every machine
            costs[i, j] = cost if cost > (j - i) * ROUNDING**2 else 0.0
    return costs


def _line(nbytes: Array, seconds: Array) -> tuple[float, float]:
    """Seconds, and seconds per byte, both >= 0, of least squared relative error."""
    weight = seconds**-2.0
    size, time = (float((weight * values).sum() / weight.sum()) for values in (nbytes, seconds))
    candidates = [(time, 0.0), (0.0, float((nbytes / seconds).sum() / ((nbytes / seconds) ** 2).sum()))]
    if len(nbytes) > 1:
        apart = nbytes - size
        per_byte_s = float((weight * apart * (seconds - time)).sum() / (weight * apart**2).sum())
        # a slope that adds no more than rounding is none
        if per_byte_s * nbytes[-1] > ROUNDING * seconds[-1] and time >= per_byte_s * size:
            candidates.append((time - per_byte_s * size, per_byte_s))
    # the error is convex: outside the quadrant its least is on an edge, and inside it is the free one's
    return min(candidates, key=lambda line: _squared_error(line, nbytes, seconds))


def _squared_error(line: tuple[float, float], nbytes: Array, seconds: Array) -> float:
    return float((((line[0] + line[1] * nbytes) / seconds - 1.0) ** 2).sum())
