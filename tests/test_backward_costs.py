"""Prices of the backward pass: by figures of its own, or, where a device has none, by the forward's efficiencies."""

import pytest

import ringsim
from ringsim.costs import Costs, backward_pass_nbytes, pass_nbytes
from ringsim.lowering import Blocking
from ringsim.schedule import Compute
from ringsim.tile import Span, Tile
from ringsim.topology.parts import Attention, Backward

POINTS = ((1.0, 0.5), (1e12, 0.5))
FIGURES = {"full": POINTS, "masked": POINTS}
ENTRY = {
    "dtype": "float32",
    "head_dim": 64,
    "rate": "100 GFLOP/s",
    "overhead": "1 ms",
    "block_overhead": "1 us",
    "pass_bandwidth": "10 GB/s",
    "micro_tile": {"q_rows": 128, "k_rows": 64, "edge_rows": 32},
    **FIGURES,
}
OWN = {
    "rate": "50 GFLOP/s",
    "overhead": "2 ms",
    "block_overhead": "3 us",
    "pass_bandwidth": "5 GB/s",
    "micro_tile": {"q_rows": 64, "k_rows": 32, "edge_rows": 16},
}
WORK = ringsim.Workload(q_len=512, heads=4, kv_heads=2, head_dim=64, v_head_dim=32, dtype="float32")


def device(**entry):
    gpu = {"kind": "gpu", "memory_bandwidth": "100 GB/s", "attention": [ENTRY | entry]}
    return ringsim.topology.parts.Device.model_validate(gpu)


def tile(rows=256, keys=512, *, lo=None, heads=4):
    q, k = Span(row=0, count=rows, start=0), Span(row=0, count=keys, start=0)
    return Tile(batch=(0, 1), heads=(0, heads), q=q, k=k, lo=lo)


def op(*tiles, kernel="attend_backward"):
    return Compute(id=0, step=0, phase=kernel, kernel=kernel, reads=(), writes=(), tiles=tiles)


def by_hand(*, rate, overhead_s, block_overhead_s, pass_rate, q_rows):
    """Of the tile: 4 heads of 256 queries on 512 keys; 2 heads of keys."""
    flops = 2 * 4 * 256 * 512 * (3 * 64 + 2 * 32)
    nbytes = 4 * (4 * 256 * (64 + 32 + 2 * 64) + 2 * 512 * 3 * (64 + 32))
    return overhead_s + 4 * (256 // q_rows) * block_overhead_s + flops / (rate * 0.5) + nbytes / pass_rate


def test_by_its_own_figures():
    priced = Costs(device(backward=OWN | FIGURES), WORK).cost(op(tile()))
    assert priced.seconds == pytest.approx(
        by_hand(rate=50e9, overhead_s=2e-3, block_overhead_s=3e-6, pass_rate=5e9, q_rows=64), rel=1e-12
    )
    assert priced.pieces == 4 * (256 // 64) * (512 // 32)


def test_what_it_leaves_out_is_as_the_entry_has_it():
    priced = Costs(device(backward=FIGURES), WORK).cost(op(tile()))
    assert priced.seconds == pytest.approx(
        by_hand(rate=100e9, overhead_s=1e-3, block_overhead_s=1e-6, pass_rate=10e9, q_rows=128), rel=1e-12
    )


@pytest.mark.parametrize("key", sorted(OWN))
def test_each_key_takes_the_place_of_the_entrys(key):
    entry = Attention.model_validate(ENTRY | {"backward": {key: OWN[key]} | FIGURES})
    own, both = entry.of_backward(), Backward.model_validate(OWN | FIGURES)
    for name in OWN:
        assert getattr(own, name) == getattr(both if name == key else entry, name)


def test_the_forward_pass_does_not_look_at_backward_figures():
    ops = op(tile(), tile(lo=0), kernel="attend")
    plain, both = Costs(device(), WORK), Costs(device(backward=OWN | FIGURES), WORK)
    assert plain.cost(ops) == both.cost(ops)
    assert plain.blocking == both.blocking == Blocking(q_rows=128, k_rows=64, edge_rows=32)
    assert both.backward_blocking == Blocking(q_rows=64, k_rows=32, edge_rows=16)


def test_without_figures_it_has_the_forwards_efficiencies_on_its_own_flops():
    on = ringsim.load_topology("rtx4090-pcie", {"devices.rtx4090.launch": "0 s", "devices.rtx4090.units": None})
    work = ringsim.Workload(q_len=2**16, heads=32, head_dim=128, dtype="bfloat16")
    costs = Costs(on.spec.devices["rtx4090"], work, "rtx4090-pcie, rtx4090")
    assert costs.borrowed == ("bfloat16 head_dim 128",)
    for one in (tile(8192, 8192, heads=32), tile(8192, 8192, lo=0, heads=32)):
        assert costs.cost(op(one)).seconds == pytest.approx(2.5 * costs.cost(op(one, kernel="attend")).seconds, rel=1e-12)
    assert costs.backward_blocking == costs.blocking


def test_figures_of_its_own_are_not_borrowed():
    assert Costs(device(backward=FIGURES), WORK).borrowed == ()
    between = ringsim.Workload(q_len=2**16, head_dim=96, dtype="bfloat16")
    b200 = ringsim.load_topology("dgx-b200").spec.devices["b200"]
    assert Costs(b200, between).borrowed == ("bfloat16 head_dim 64",)


def test_what_a_tile_brings_in_and_takes_out():
    one = tile(3, 5, heads=4)
    q, dout, dq, k, v = 3 * 4 * 64, 3 * 4 * 32, 3 * 4 * 64, 5 * 2 * 64, 5 * 2 * 32
    assert pass_nbytes(WORK, one) == 4 * (q + 2 * dout + k + v)
    assert backward_pass_nbytes(WORK, one) == 4 * (q + dout + 2 * dq + 3 * (k + v))


def test_blocks_of_keys_fill_a_device():
    """A fused backward kernel gives keys, not queries, to a unit: few queries do not leave any idle."""
    work = ringsim.Workload(q_len=2**16, heads=1, head_dim=128, dtype="bfloat16")
    units = 132
    on = ringsim.load_topology("dgx-h100", {"devices.h100.launch": "0 s"})
    costs = Costs(on.spec.devices["h100"], work)
    few_queries, few_keys = tile(128, 128 * units, heads=1), tile(128 * units, 128, heads=1)
    for kernel, idle, busy in (("attend", few_queries, few_keys), ("attend_backward", few_keys, few_queries)):
        ratio = costs.cost(op(idle, kernel=kernel)).seconds / costs.cost(op(busy, kernel=kernel)).seconds
        assert ratio == pytest.approx(units, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "table", "index", "pairs", "tflops"),
    [
        ("dgx-h100", "full", 0, 16384**2, 474),
        ("dgx-h100", "full", 1, 4096**2, 542),
        ("dgx-h200", "full", 1, 16384**2, 612),
        ("dgx-h200", "masked", 1, 32768 * 32769 // 2, 581),
        ("gb200-nvl72", "full", 0, 8192**2, 1404),
        # a difference of two times: 32 heads of 64k, 1236 ms forward and backward, 324 ms forward
        ("dgx-a100", "full", 0, 65536**2, 2.5 * 4 * 32 * 128 * 65536**2 / 0.912 / 1e12),
    ],
)
def test_published_rates_are_in_the_machines(name, table, index, pairs, tflops):
    machine = ringsim.load_topology(name)
    found = machine.device(machine.devices[0])
    entry = found.attention[index]
    assert dict(getattr(entry.backward, table))[pairs] * found.rate(entry.of_backward()) == pytest.approx(tflops * 1e12, rel=1e-3)


def simulated(name, pass_, settings=(), *, ranks=4, fold=None):
    work = ringsim.Workload(q_len=ranks * 2048, heads=16, kv_heads=4, head_dim=128, dtype="bfloat16", pass_=pass_)
    schedule = ringsim.Schedule(workload=work, world_size=ranks)
    return ringsim.simulate(schedule, ringsim.load_topology(name, settings), fold=fold)


def test_a_simulation_says_where_efficiencies_are_the_forwards():
    said = "forward's efficiencies: rtx4090-pcie, rtx4090 has no backward figures for bfloat16 head_dim 128"
    assert simulated("rtx4090-pcie", "both").facts["backward"] == said
    assert simulated("rtx4090-pcie", "backward").facts["backward"] == said
    assert "backward" not in simulated("rtx4090-pcie", "forward").facts
    assert "backward" not in simulated("dgx-h100", "both").facts


@pytest.mark.parametrize("name", ringsim.topology.names())
def test_every_machine_predicts_a_backward_pass(name):
    machine = ringsim.load_topology(name)
    table = machine.device(machine.devices[0]).attention[0]
    work = ringsim.Workload(q_len=4096, heads=2, head_dim=table.head_dim, dtype=table.dtype, pass_="both", mask=ringsim.Causal())
    schedule = ringsim.Schedule(workload=work, world_size=2, partition="zigzag")
    timeline = ringsim.simulate(schedule, machine)
    assert {"attend", "attend_backward"} <= {event.kind for event in timeline.events}
    assert ("backward" in timeline.facts) == (table.backward is None)


def test_forward_then_backward_folds():
    settings = {"nodes": 4}
    folded, whole = (simulated("dgx-h100-cluster", "both", settings, ranks=32, fold=fold) for fold in (True, False))
    assert folded.facts["alike"] == 8
    assert folded.total_s == pytest.approx(whole.total_s, rel=1e-12)
