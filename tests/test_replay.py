"""Published rings, replayed from a single-GPU figure: what is set, what is counted, and how far off the predictions are."""

import importlib.util
from pathlib import Path
from statistics import median

import pytest

from ringsim import Schedule, load_topology
from ringsim.schedule import Compute

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("replay", ROOT / "benchmarks" / "replay.py")
replay = importlib.util.module_from_spec(spec)
spec.loader.exec_module(replay)

CASES = list(replay.cases())
N, M, K = 8192 * 32 * 128, 8192 * 32, 8192 * 8 * 128


@pytest.fixture(scope="module")
def rows():
    return [row for case in CASES for row in replay.replay(case)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.machine}-{case.workload.heads}-{case.pass_}")
def test_only_the_rates_of_one_gpu_are_set_and_a_local_call_takes_what_was_published(case):
    topology = replay.calibrated(case)
    taken_s = replay.local_s(topology, case, "attend")[0]
    assert taken_s == pytest.approx(1 / case.local_forward, rel=1e-9)
    if case.pass_ == "both":
        assert taken_s + replay.local_s(topology, case, "attend_backward")[0] == pytest.approx(1 / case.local, rel=1e-9)
    shipped = load_topology(case.topology, case.settings)
    (kind,) = set(shipped.spec.devices) - {"slow"}
    for one, other in zip(topology.spec.devices[kind].attention, shipped.spec.devices[kind].attention, strict=True):
        rates = {"rate": other.rate, "backward": one.backward.model_copy(update={"rate": other.backward.rate})}
        assert one.model_copy(update=rates) == other
    assert topology.spec.links == shipped.spec.links and topology.spec.transports == shipped.spec.transports


def small_kernels(case, layout, rank, *, fused):
    """Bytes of each small kernel of a rank's program."""
    schedule = Schedule(workload=case.workload, world_size=case.ranks, partition=replay.PARTITIONS[layout])
    replayed = replay.Replayed(schedule, replay.Source(case.api, fused=fused))
    ops = list(replayed.program(rank))
    blocks = [op for op in schedule.program(rank) if not isinstance(op, Compute) or op.kernel.startswith("attend")]
    assert [op for op in ops if getattr(op, "kernel", "") != "elementwise"] == blocks
    assert len({op.id for op in ops}) == len(ops)
    return [op.nbytes for op in ops if getattr(op, "kernel", "") == "elementwise"]


def test_the_sources_small_kernels_are_counted_to_the_byte():
    forward, both = CASES[:2]
    assert (forward.pass_, both.pass_, forward.workload.heads) == ("forward", "both", 32)
    pack, merge = [4 * K] * 2, 10 * N + 12 * M
    assert small_kernels(forward, "ring", 7, fused=True) == [*pack, 6 * N, *[merge] * 7, 6 * N]
    assert small_kernels(forward, "ring", 0, fused=True) == [*pack, 6 * N, 6 * N]
    halves = [10 * N // 2 + 12 * M // 2, 8 * N // 2, 8 * M // 2]
    assert small_kernels(forward, "zigzag", 0, fused=True) == [*pack, 6 * N, *halves * 7, 6 * N]
    assert small_kernels(forward, "zigzag", 7, fused=True) == [*pack, 6 * N, *[merge] * 7, 6 * N]
    n, m = 8191 * 32 * 128, 8191 * 32
    one_less = [10 * n + 12 * m, 8 * n, 8 * m]
    assert small_kernels(forward, "stripe", 0, fused=True) == [*pack, 6 * N, *one_less * 7, 6 * N]
    last = small_kernels(both, "ring", 7, fused=True)[len(pack) + 9 :]
    assert last[:3] == [6 * N, 6 * K, 6 * K]
    assert sorted(last[3 : 3 + 21]) == sorted([10 * N] * 7 + [10 * K] * 14)
    assert last[24:] == [6 * N, 6 * K, 6 * K, 4 * K, 4 * K, 4 * K, 4 * K, 12 * K]


def test_without_fusion_each_operation_of_the_merge_is_a_kernel():
    new, old = (replay.Source(api, fused=False) for api in ("kvpacked", "qkvpacked"))
    assert sum(new.merge(N, 0, sliced=False)) == 38 * N and len(list(new.merge(N, M, sliced=False))) == 9
    assert sum(old.merge(N, 0, sliced=False)) == 34 * N and len(list(old.merge(N, M, sliced=False))) == 13


@pytest.mark.parametrize(
    ("pass_", "kernels", "middle", "largest"),
    [
        ("forward", "own", 0.17, 0.42),
        ("forward", "fused", 0.08, 0.26),
        ("forward", "op by op", 0.11, 0.31),
        ("both", "own", 0.12, 0.19),
        ("both", "fused", 0.09, 0.15),
        ("both", "op by op", 0.06, 0.18),
    ],
)
def test_how_far_off_the_predictions_are(rows, pass_, kernels, middle, largest):
    errors = [abs(row.error(kernels)) for row in rows if row.case.pass_ == pass_]
    assert len(errors) == 12
    assert median(errors) < middle and max(errors) < largest


def test_a_contiguous_ring_is_the_slowest_as_published(rows):
    for kernels in replay.KERNELS:
        for case in CASES:
            predicted = {row.ring: row.predicted[kernels] for row in rows if row.case is case}
            assert min(predicted, key=predicted.get) == min(case.rings, key=case.rings.get) == "ring"


def test_the_page_has_the_table(rows):
    page = (ROOT / "docs" / "prediction.md").read_text()
    assert replay.table(rows) in page, "write it anew: python benchmarks/replay.py"
