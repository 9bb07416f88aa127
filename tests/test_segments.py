"""Segments: measured message costs become pieces of latency and bandwidth, the best there are."""

import math
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ringsim.errors import CalibrationError
from ringsim.segments import MOST_NBYTES, MOST_POINTS, Segment, fit, mean_error, predict, read_osu, to_regimes
from ringsim.units import parse

FILE = Path(__file__).parent / "data" / "osu_latency_gh200_slingshot.yaml"
TABLES = {
    name: tuple((nbytes, us * 1e-6) for nbytes, us in table["latency_us"].items())
    for name, table in yaml.safe_load(FILE.read_text(encoding="utf-8"))["tables"].items()
}
# percent, of 1 to 4 segments
ERRORS = {
    "cray_mpich_8_1_32": (21.7, 6.7, 2.0, 1.0),
    "openmpi_4_1_6": (31.1, 6.8, 1.4, 0.9),
    "openmpi_5_0_3": (18.9, 9.4, 1.6, 1.0),
    "cray_mpich_9_1_0": (18.2, 8.3, 1.5, 1.1),
}
THOROUGH = settings(max_examples=200, deadline=None)

SECONDS = st.floats(1e-7, 1e-2)
POINTS = st.dictionaries(st.integers(1, 2**30), SECONDS, min_size=2, max_size=9).map(lambda table: tuple(sorted(table.items())))
LATENCIES = st.just(0.0) | st.floats(1e-7, 1e-3)
BANDWIDTHS = st.just(math.inf) | st.floats(1e6, 1e12)


def squared_error(segments, points):
    return sum((predict(segments, nbytes) / seconds - 1) ** 2 for nbytes, seconds in points)


def pieces(segments, points):
    """Each segment with the points that it was fitted to."""
    ends = [segment.from_nbytes for segment in segments[1:]] + [math.inf]
    for segment, end in zip(segments, ends, strict=True):
        yield segment, [point for point in points if segment.from_nbytes <= point[0] < end]


@pytest.mark.parametrize("name", TABLES)
def test_three_segments_are_within_two_percent_of_each_measured_table(name):
    assert mean_error(fit(TABLES[name], 3), TABLES[name]) <= 0.021
    found = tuple(100 * mean_error(fit(TABLES[name], count), TABLES[name]) for count in (1, 2, 3, 4))
    assert found == pytest.approx(ERRORS[name], abs=0.051)


def test_the_pieces_are_the_protocols_of_the_mpi():
    # Open MPI 4.1.6 is slower below 256 B than above, and goes from eager to rendezvous at 32 KiB
    assert [segment.from_nbytes for segment in fit(TABLES["openmpi_4_1_6"], 3)] == [0, 256, 32768]


@st.composite
def piecewise(draw):
    """Segments and points that lie on them, two or more on each."""
    counts = draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    sizes = sorted(draw(st.sets(st.integers(1, 2**30), min_size=sum(counts), max_size=sum(counts))))
    segments, points = [], []
    for count in counts:
        first = len(points)
        latency_s, bandwidth = draw(st.tuples(LATENCIES, BANDWIDTHS).filter(lambda cost: cost != (0.0, math.inf)))
        segments.append(Segment(from_nbytes=sizes[first] if first else 0, latency_s=latency_s, bandwidth_bytes_per_s=bandwidth))
        points += [(nbytes, predict(segments, nbytes)) for nbytes in sizes[first : first + count]]
    return segments, points


@THOROUGH
@given(piecewise())
def test_points_on_segments_are_met_exactly(drawn):
    segments, points = drawn
    found = fit(points, len(segments))
    assert mean_error(found, points) < 1e-9
    assert len(found) <= len(segments)


def test_segments_that_the_points_tell_apart_are_found_again():
    segments = (
        Segment(from_nbytes=0, latency_s=2e-6, bandwidth_bytes_per_s=math.inf),
        Segment(from_nbytes=1024, latency_s=3e-6, bandwidth_bytes_per_s=4e9),
        Segment(from_nbytes=65536, latency_s=0.0, bandwidth_bytes_per_s=5e9),
    )
    points = [(2**power, predict(segments, 2**power)) for power in range(23)]
    # two more are asked for than there are
    for found, one in zip(fit(points, 5), segments, strict=True):
        assert found.from_nbytes == one.from_nbytes
        assert found.latency_s == pytest.approx(one.latency_s, abs=1e-15)
        assert found.bandwidth_bytes_per_s == pytest.approx(one.bandwidth_bytes_per_s)


@THOROUGH
@given(POINTS, st.integers(1, 4))
@example(((1, 4e-6), (2, 3e-6), (4, 2e-6), (8, 1e-6)), 2)
def test_no_small_step_from_a_fitted_line_betters_it(points, count):
    """The conditions of Karush, Kuhn and Tucker, which for a convex error are those of the one best line."""
    for segment, mine in pieces(fit(points, min(count, len(points) // 2)), points):
        nbytes, seconds = np.array(mine, float).T
        latency_s, per_byte_s = segment.latency_s, 1 / segment.bandwidth_bytes_per_s
        assert latency_s >= 0
        assert per_byte_s >= 0
        residual = (latency_s + per_byte_s * nbytes) / seconds - 1
        for value, direction in ((latency_s, 1 / seconds), (per_byte_s, nbytes / seconds)):
            slope = float(residual @ direction) / float(np.linalg.norm(direction))
            assert slope > -1e-6
            assert slope < 1e-6 or value == 0


def best_line(points):
    """By another road than that of the fit: least squares over each set of unknowns that may be off zero."""
    nbytes, seconds = np.array(points, float).T
    scale = np.array([seconds.mean(), (seconds / nbytes).mean()])
    design = np.stack([1 / seconds, nbytes / seconds], axis=1) * scale
    errors = []
    for columns in ([0, 1], [0], [1]):
        line, *_ = np.linalg.lstsq(design[:, columns], np.ones(len(points)), rcond=None)
        if (line >= 0).all():
            errors.append(float(((design[:, columns] @ line - 1) ** 2).sum()))
    return min(errors)


def best_of_all_cuts(points, count):
    totals = []
    for number in range(count):
        for cuts in combinations(range(1, len(points)), number):
            bounds = [0, *cuts, len(points)]
            parts = [points[start:end] for start, end in pairwise(bounds)]
            if all(len(part) >= 2 for part in parts):
                totals.append(sum(map(best_line, parts)))
    return min(totals)


@THOROUGH
@given(POINTS, st.integers(1, 4))
def test_no_other_cuts_are_better(points, count):
    count = min(count, len(points) // 2)
    assert squared_error(fit(points, count), points) == pytest.approx(best_of_all_cuts(points, count), rel=1e-6, abs=1e-9)


@THOROUGH
@given(POINTS)
@example(((1, 1e-6), (2, 2e-6), (3, 3e-6), (4, 1e-5), (5, 1.1e-5), (6, 1.2e-5)))
def test_more_segments_are_never_worse(points):
    errors = [squared_error(fit(points, count), points) for count in range(1, len(points) // 2 + 1)]
    assert all(more <= fewer * (1 + 1e-9) + 1e-18 for fewer, more in pairwise(errors))


def test_times_that_fall_with_size_become_a_latency():
    points = [(2**power, 1e-5 / (power + 1)) for power in range(8)]
    assert all(segment.bandwidth_bytes_per_s == math.inf for segment in fit(points, 3))


def test_times_that_grow_faster_than_size_become_a_bandwidth():
    points = [(2**power, 1e-9 * 4**power) for power in range(8)]
    assert all(segment.latency_s == 0 for segment in fit(points, 3))


def test_one_point_is_a_latency():
    assert fit([(8, 2e-6)], 1) == (Segment(from_nbytes=0, latency_s=2e-6, bandwidth_bytes_per_s=math.inf),)


def test_the_same_points_give_the_same_bits():
    assert fit(TABLES["openmpi_5_0_3"], 4) == fit(list(TABLES["openmpi_5_0_3"]), 4)


def test_a_table_of_the_most_points_is_fitted_in_seconds():
    points = [(1000 * number, 1e-6 * number) for number in range(1, MOST_POINTS + 1)]
    assert len(fit(points, MOST_POINTS // 2)) == 1


GOOD = [(8, 1e-6), (16, 2e-6), (32, 3e-6)]


@pytest.mark.parametrize(
    ("points", "segments", "message"),
    [
        ([], 1, "no points to fit: give (bytes, seconds) of one message or more"),
        (GOOD, 2, "2 segments of 3 points: 2 points each make at most 1; ask for 1 to 1, or measure more sizes"),
        (GOOD, 0, "0 segments of 3 points: 2 points each make at most 1; ask for 1 to 1, or measure more sizes"),
        (GOOD[:1], 2, "2 segments of 1 points: 2 points each make at most 1; ask for 1 to 1, or measure more sizes"),
        ([*GOOD, (64, math.nan)], 1, "point 4: nan s for 64 B; expected 1e-12 to 1e+06 s"),
        ([*GOOD, (64, -1e-6)], 1, "point 4: -1e-06 s for 64 B; expected 1e-12 to 1e+06 s"),
        ([*GOOD, (64, 0.0)], 1, "point 4: 0.0 s for 64 B; expected 1e-12 to 1e+06 s"),
        ([*GOOD, (64, math.inf)], 1, "point 4: inf s for 64 B; expected 1e-12 to 1e+06 s"),
        ([*GOOD, (64, 1e300)], 1, "point 4: 1e+300 s for 64 B; expected 1e-12 to 1e+06 s"),
        ([(-8, 1e-6), *GOOD], 1, f"point 1: a size of -8 B; expected 1 to {MOST_NBYTES} B"),
        ([(0, 1e-6), *GOOD], 1, f"point 1: a size of 0 B; expected 1 to {MOST_NBYTES} B"),
        ([*GOOD, (10**19, 1e-6)], 1, f"point 4: a size of 10000000000000000000 B; expected 1 to {MOST_NBYTES} B"),
        ([*GOOD, (32, 1e-6)], 1, "point 4: 32 B after 32 B; sizes increase, each comes once: give one table at a time"),
        ([*GOOD, (8, 1e-6)], 1, "point 4: 8 B after 32 B; sizes increase, each comes once: give one table at a time"),
        (
            [(number, 1e-6) for number in range(1, MOST_POINTS + 2)],
            1,
            f"{MOST_POINTS + 1} points are more than {MOST_POINTS}: leave out sizes that lie close together",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused(points, segments, message):
    with pytest.raises(CalibrationError) as caught:
        fit(points, segments)
    assert str(caught.value) == message


def test_a_size_too_long_to_print_is_refused():
    with pytest.raises(CalibrationError, match="a size of a number of very many digits B"):
        fit([(10**5000, 1e-6)], 1)


@st.composite
def hostile(draw):
    sizes = st.integers() | st.sampled_from([0, 1, 2**53, 2**53 - 1, 10**400])
    return draw(st.lists(st.tuples(sizes, st.floats() | st.sampled_from([1e-12, 1e6])), max_size=6))


@THOROUGH
@given(hostile(), st.integers())
def test_any_points_are_segments_or_a_calibration_error(points, count):
    try:
        found = fit(points, count)
    except CalibrationError as error:
        assert "\n" not in str(error)
    else:
        assert all(segment.latency_s >= 0 and segment.bandwidth_bytes_per_s > 0 for segment in found)
        assert math.isfinite(mean_error(found, points))


def test_a_segment_holds_its_first_byte_and_the_last_one_has_no_end():
    segments = (
        Segment(from_nbytes=0, latency_s=1.0, bandwidth_bytes_per_s=math.inf),
        Segment(from_nbytes=100, latency_s=2.0, bandwidth_bytes_per_s=10.0),
    )
    assert [predict(segments, nbytes) for nbytes in (0, 99, 100, 1000)] == [1.0, 1.0, 12.0, 102.0]
    assert mean_error(segments, [(50, 1.0), (100, 10.0)]) == pytest.approx(0.1)


@pytest.mark.parametrize("nbytes", [-1, 10**400])
def test_a_message_of_no_possible_size_is_refused(nbytes):
    segments = fit(GOOD, 1)
    with pytest.raises(CalibrationError, match=f"^no segment holds a message of .* B: 1 segments, 0 to {MOST_NBYTES} B$"):
        predict(segments, nbytes)
    with pytest.raises(CalibrationError, match="0 segments"):
        predict((), 8)


def test_an_error_needs_points_to_be_a_mean_of():
    with pytest.raises(CalibrationError, match="no points to compare the segments with"):
        mean_error(fit(GOOD, 1), [])
    with pytest.raises(CalibrationError, match="point 2: 0 s for 8 B"):
        mean_error(fit(GOOD, 1), [(8, 1e-6), (8, 0)])


OSU = """\
# OSU MPI-CUDA Latency Test v7.5
# Datatype: MPI_CHAR.
# Size       Avg Latency(us)
0                       1.90
1                       2.76

8192                    7.59
4194304               180.44
"""
READ = ((1, 2.76e-6), (8192, 7.59e-6), (4194304, 180.44e-6))


@pytest.mark.parametrize(
    "text",
    [
        OSU,
        OSU.replace("\n", "\r\n"),
        OSU.replace("Avg Latency(us)", "Latency (us)").replace("MPI-CUDA", "MPI").replace("# Datatype: MPI_CHAR.\n", ""),
        OSU.replace("(us)", "(us)   Min Latency(us)   Max Latency(us)  Iterations").replace("59", "59  7.1  99.8  1000"),
        OSU.replace("(us)", "(us)   Validation").replace("180.44", "180.44  Pass"),
        "# Size Latency (us)\n1 2.76\n8192 7.59\n  4194304\t180.44",
    ],
    ids=["version 7", "carriage returns", "version 5", "full report", "validated", "bare"],
)
def test_the_output_of_osu_latency_is_read(text):
    assert read_osu(text, "osu.txt") == READ


def test_what_is_read_can_be_fitted():
    rows = "".join(f"{nbytes} {seconds * 1e6:.2f}\n" for nbytes, seconds in TABLES["openmpi_5_0_3"])
    points = read_osu(f"# Size Latency (us)\n{rows}", "osu.txt")
    assert points == pytest.approx(np.array(TABLES["openmpi_5_0_3"]))
    assert mean_error(fit(points, 3), points) <= 0.021


ROW = "expected a row of bytes and microseconds such as '8192 7.59'"
WINDOW = (
    "a bandwidth test has a window of messages under way at once, so that bytes / bandwidth is not the time of one;"
    " give the output of osu_latency"
)
WRONG = "the benchmark found wrong data in this message; measure again"
ONE = "expected the latency in us of one message between two ranks; give the output of osu_latency"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("180.44", "nan", f"osu.txt:8: '4194304               nan': {ROW}"),
        ("180.44", "-180.44", f"osu.txt:8: '4194304               -180.44': {ROW}"),
        ("180.44", "", f"osu.txt:8: '4194304': {ROW}"),
        ("4194304", "-4194304", f"osu.txt:8: '-4194304               180.44': {ROW}"),
        ("4194304", "4M", f"osu.txt:8: '4M               180.44': {ROW}"),
        ("\n\n", "\nWARNING: no CUDA\n", f"osu.txt:6: 'WARNING: no CUDA': {ROW}"),
        ("4194304", "9" * 70, f"osu.txt:8: '{'9' * 63}...: {ROW}"),
        ("4194304", "9" * 19, f"osu.txt:8: a size of {'9' * 19} B; expected 1 to {MOST_NBYTES} B"),
        ("180.44", "0.00", "osu.txt:8: 0.0 s for 4194304 B; expected 1e-12 to 1e+06 s"),
        ("180.44", "9999999999999", "osu.txt:8: 9999999.999999 s for 4194304 B; expected 1e-12 to 1e+06 s"),
        ("4194304", "8192", "osu.txt:8: 8192 B after 8192 B; sizes increase, each comes once: give one table at a time"),
        ("4194304", "1", "osu.txt:8: 1 B after 8192 B; sizes increase, each comes once: give one table at a time"),
        ("180.44", "180.44 Fail", f"osu.txt:8: '4194304               180.44 Fail': {WRONG}"),
        ("(us)", "(ms)", f"osu.txt:3: '# Size       Avg Latency(ms)': {ONE}"),
        ("Latency Test", "Allreduce Latency Test", f"osu.txt:1: '# OSU MPI-CUDA Allreduce Latency Test v7.5': {ONE}"),
        ("Latency Test", "Bandwidth Test", f"osu.txt:1: '# OSU MPI-CUDA Bandwidth Test v7.5': {WINDOW}"),
        ("Avg Latency(us)", "Bandwidth (MB/s)", f"osu.txt:3: '# Size       Bandwidth (MB/s)': {WINDOW}"),
        ("Avg Latency(us)", "MB/s   Messages/s", f"osu.txt:3: '# Size       MB/s   Messages/s': {WINDOW}"),
        (
            "# Size       Avg Latency(us)\n",
            "",
            "osu.txt:3: a row before the header '# Size  Latency (us)', its unit: give all that osu_latency printed",
        ),
    ],
)
def test_what_osu_latency_did_not_print_is_refused_with_file_and_line(old, new, message):
    with pytest.raises(CalibrationError) as caught:
        read_osu(OSU.replace(old, new), "osu.txt")
    assert str(caught.value) == message


@pytest.mark.parametrize("text", ["", "\n\n", "# Size Latency (us)\n", "# Size Latency (us)\n0 1.00\n"])
def test_an_output_without_messages_is_refused(text):
    with pytest.raises(CalibrationError) as caught:
        read_osu(text, "osu.txt")
    assert str(caught.value) == "osu.txt: no row of size and latency: give all that osu_latency printed"


LINES = st.sampled_from([*OSU.splitlines(), "# Size Bandwidth (MB/s)", "1 nan", "٣ 4", "1 1_0"]) | st.text(max_size=12)


@THOROUGH
@given(st.lists(LINES | st.builds("{} {}".format, st.integers(), st.floats()), max_size=8).map("\n".join))
def test_any_text_is_points_or_a_calibration_error(text):
    try:
        points = read_osu(text, "osu.txt")
    except CalibrationError as error:
        assert str(error).startswith("osu.txt")
    else:
        fit(points, 1)


def test_segments_are_written_as_a_topology_has_them():
    segments = (
        Segment(from_nbytes=0, latency_s=2.719e-6, bandwidth_bytes_per_s=math.inf),
        Segment(from_nbytes=8192, latency_s=0.0, bandwidth_bytes_per_s=24.2e9),
    )
    assert to_regimes(segments) == [
        {"from": "0 B", "latency": "2.719 us"},
        {"from": "8192 B", "latency": "0 us", "bandwidth": "24.2 GB/s"},
    ]


def read_back(regimes):
    return tuple(
        Segment(
            from_nbytes=int(parse(regime["from"], "size")),
            latency_s=parse(regime["latency"], "time"),
            bandwidth_bytes_per_s=parse(regime["bandwidth"], "bandwidth") if "bandwidth" in regime else math.inf,
        )
        for regime in regimes
    )


@THOROUGH
@given(POINTS, st.integers(1, 4), st.integers(0, 2**40))
@example(((1, 1e-12), (2**53, 1e6)), 1, 2**53)
def test_no_predicted_time_is_changed_by_writing_and_reading(points, count, nbytes):
    segments = fit(points, min(count, len(points) // 2))
    again = read_back(to_regimes(segments))
    assert [segment.from_nbytes for segment in again] == [segment.from_nbytes for segment in segments]
    assert predict(again, nbytes) == pytest.approx(predict(segments, nbytes), rel=1e-5)
