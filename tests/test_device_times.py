"""Calibration of GPUs, on paper GPUs whose times are known: what it finds is what they do, and predicts what it did not see."""

import pytest
import yaml
from timed_gpu import World, backend_of
from timed_ring import KERNEL, ONE_DEVICE, PRODUCTS, RATE, TRUTH, calibrated, machine, ring_s, sharing, subject_of
from timed_tiles import FLOPS, TimedTiles

from ringsim import device_hops, device_times, simulate, topology
from ringsim.calibration import to_yaml
from ringsim.cli.calibrate import _lines
from ringsim.costs import Costs
from ringsim.device_bench import Form, Room, Watch, forward_ops
from ringsim.device_calibration import measure_devices
from ringsim.device_times import Trial, measure_launch, measure_pass
from ringsim.errors import CalibrationError, DeviceError
from ringsim.mask import Causal
from ringsim.parts import Band
from ringsim.schedule import Compute, Schedule
from ringsim.tile import Span, Tile
from ringsim.workload import Workload

SHARED = sharing(ONE_DEVICE, [0, 0, 0])
LOSS = {"sharing": 0.9}


@pytest.fixture(scope="module")
def apart():
    """Two ranks, a device each."""
    return calibrated(TRUTH, 2)


@pytest.fixture(scope="module")
def together():
    """Three ranks on one device, which loses a tenth to their taking turns."""
    return calibrated(SHARED, 3, **LOSS)


@pytest.fixture
def few(monkeypatch):
    """Where tiles are not what is asked about."""
    monkeypatch.setattr(device_times, "ROWS", (512, 2048))
    monkeypatch.setattr(device_times, "MATRIX_ROWS", (1024,))
    monkeypatch.setattr(device_hops, "HOP_NBYTES", tuple(2**size for size in (12, 14, 16, 18, 20, 22, 25)))
    monkeypatch.setattr(device_hops, "SAMPLES", 2)
    monkeypatch.setattr(device_hops, "LOOKS", 2)


def only(values):
    (device,) = values["devices"].values()
    return device


def number(text):
    return float(text.split()[0])


# what is written


def test_what_is_written_is_a_topology_that_reads_back(apart, together):
    for values in (apart, together):
        text = to_yaml(values)
        assert yaml.safe_load(text) == values
        assert topology.parse(text) == machine(values)


def test_every_figure_names_its_source(apart, together):
    for values in (apart, together):
        sources = {(figure.kind, figure.source) for figure in machine(values).figures}
        told = {one for one in sources if not one[1].startswith("ringsim calibrate on Paper GPU 100, 20")}
        assert told == {("vendor", "what CUDA says of the device")}
        assert {kind for kind, _ in sources} == {"vendor", "measured"}


def test_notes_say_what_the_figures_depend_on(apart):
    notes = apart["notes"]
    assert (notes["cuda_driver"], notes["nvrtc"]) == (13000, [13, 0])
    assert notes["transport_chosen"] == "transport paper: it is all there is"
    assert notes["taken_from_each_other"] == {"kernels": 0.1, "messages": 0.2}
    assert len(notes["hops between"]) == len(device_hops.HOP_NBYTES)


def test_the_message_says_what_was_found(apart, together):
    assert _lines(apart)[0].startswith("bfloat16 head_dim 64: 3.9")
    assert _lines(apart)[-1].startswith("hop between: 8.1")
    assert _lines(together)[-1].endswith("driven by handshake")


# devices


def test_a_device_is_what_it_is(apart):
    device = only(apart)
    assert list(apart["devices"]) == ["paper-gpu-100"]
    assert device["kind"] == "gpu"
    assert (device["units"]["value"], device["memory"]["value"]) == (8, "2048 MiB")
    assert number(device["memory_bandwidth"]) == pytest.approx(100, rel=0.01)
    assert number(device["matmul"]["bfloat16"]) == pytest.approx(PRODUCTS / 1e12, rel=0.01)
    assert "speed" not in device


def test_efficiencies_are_those_of_the_kernels(apart):
    (table,) = only(apart)["attention"]
    tiles = TimedTiles(RATE, 8)
    rate = number(table["rate"]) * 1e12
    for kind, masked in (("full", False), ("masked", True)):
        *points, last = table[kind]
        assert len(points) == len(device_times.ROWS)
        for pairs, efficiency in points[3:]:
            assert efficiency * rate == pytest.approx(RATE * tiles.efficiency(pairs, masked), rel=0.03)
        assert last == [2**50, points[-1][1]]
    assert max(efficiency for _, efficiency in table["full"]) == 1.0
    assert table["micro_tile"] == {"q_rows": 128, "k_rows": 128, "edge_rows": 128, "exact": True}


def test_gradients_are_added_apart_from_their_tiles(apart):
    """Three sums of 2, 4 and 4 bytes an element each are 30; the model counts 40."""
    (table,) = only(apart)["attention"]
    assert number(table["backward"]["pass_bandwidth"]) == pytest.approx(100 * 40 / 30, rel=0.01)
    # TimedTiles takes 5/4 of the FLOPs that the model counts
    assert number(table["backward"]["rate"]) == pytest.approx(number(table["rate"]) * 4 / 5, rel=0.01)


def test_a_device_that_ranks_share(together):
    device = only(together)
    assert device["speed"] == pytest.approx(0.9, rel=0.01)
    assert device["inside"] == "within"
    assert (together["machine"], together["place"]) == ("paper-gpu-100", [0, 0, 0])
    # its figures are of one rank alone on it
    assert number(device["attention"][0]["rate"]) == pytest.approx(3.93, rel=0.01)


# hops


def test_hops_between_devices(apart):
    assert apart["machine"] == {"join": "switch", "link": "between", "count": 2, "of": "paper-gpu-100"}
    (transport,) = apart["transports"].values()
    path = transport["paths"]["between"]
    assert number(path["latency"]) == pytest.approx(8, abs=0.4)
    assert number(path["bandwidth"]) == pytest.approx(4, rel=0.01)
    assert (transport["progress"], transport["drives"]) == ("offload", "receiver")
    assert number(transport["look"]) == pytest.approx(20, rel=0.1)
    assert transport["device_share"] == pytest.approx(0.1, abs=0.01)
    assert transport["slowed_by_compute"] == pytest.approx(0.2, abs=0.01)


def test_hops_within_a_device(together):
    within = together["links"]["within"]
    assert number(within["latency"]) == pytest.approx(10, abs=0.6)
    assert number(within["bandwidth"]) == pytest.approx(20, rel=0.01)
    (transport,) = together["transports"].values()
    assert (transport["progress"], transport["drives"]) == ("handshake", "sender")
    assert "paths" not in transport


def test_what_all_hops_share_is_a_backplane(few):
    shared = TRUTH.replace("count: 2", "backplane: 5 GB/s, count: 3")
    values = calibrated(shared, 3)
    assert number(values["machine"]["backplane"]) == pytest.approx(5, rel=0.02)
    assert number(values["transports"]["paper"]["paths"]["between"]["bandwidth"]) == pytest.approx(4, rel=0.01)


def test_ranks_in_turns_on_devices_have_links_of_both_kinds(few):
    values = calibrated(sharing(TRUTH, [0, 1, 0, 1]), 4)
    assert values["place"] == [0, 1, 0, 1]
    assert number(values["links"]["within"]["bandwidth"]) == pytest.approx(20, rel=0.01)
    # two messages cross each wire in each direction
    assert number(values["links"]["between"]["bandwidth"]) == pytest.approx(4, rel=0.01)
    assert number(values["machine"]["backplane"]) == pytest.approx(4 * 2, rel=0.02)
    placed = machine(values).place(4)
    assert placed[0] == placed[2] != placed[1] == placed[3]


def test_messages_that_change_their_protocol_have_regimes(few):
    steps = "{bandwidth: 20 GB/s, regimes: [{from: 0 B, latency: 10 us, bandwidth: 1 GB/s}, {from: 128 KiB, latency: 90 us}]}"
    values = calibrated(sharing(ONE_DEVICE.replace("{bandwidth: 20 GB/s, latency: 10 us}", steps), [0, 0]), 2)
    regimes = values["links"]["within"]["regimes"]
    assert len(regimes) > 1
    assert number(regimes[0]["latency"]) == pytest.approx(10, rel=0.05)
    path = machine(values).path(*machine(values).place(2))
    assert path.seconds(2**14) == pytest.approx(10e-6 + 2**14 / 1e9, rel=0.05)
    assert path.seconds(2**24) == pytest.approx(90e-6 + 2**24 / 20e9, rel=0.05)


def test_a_transport_whose_copies_take_a_core_is_not_slowed(few):
    values = calibrated(TRUTH.replace("progress: offload", "progress: polling, drives: both"), 2)
    (transport,) = values["transports"].values()
    assert transport["progress"] == "polling"
    assert not {"device_share", "slowed_by_compute"} & set(transport)


def test_a_device_share_that_is_declared_is_taken(few, monkeypatch):
    monkeypatch.setattr("timed_gpu.Endpoint.declared_share", 0.0)
    values = calibrated(TRUTH, 2)
    share = values["transports"]["paper"]["device_share"]
    assert share["value"] == 0.0
    assert share["source"].startswith("defined: transport paper declares it")
    assert values["notes"]["taken_from_each_other"]["kernels"] == pytest.approx(0.1, abs=0.01)


# what was not seen


def costs_of(values, **work):
    found = machine(values)
    return Costs(found.device(found.devices[0]), Workload(head_dim=64, dtype="bfloat16", **work))


@pytest.mark.parametrize("kernel", ["attend", "attend_backward"])
@pytest.mark.parametrize(
    ("rows", "keys", "heads", "masked"),
    [(3000, 3000, 4, True), (700, 700, 16, True), (700, 700, 16, False), (1500, 6000, 8, False), (12000, 12000, 1, True)],
)
def test_tiles_that_calibration_did_not_see(apart, kernel, rows, keys, heads, masked):
    q, k = Span(row=0, count=rows, start=0), Span(row=0, count=keys, start=0)
    tile = Tile(batch=(0, 1), heads=(0, heads), q=q, k=k, lo=0 if masked else None)
    op = Compute(id=0, step=0, phase="", kernel=kernel, reads=(), writes=(), tiles=(tile,))
    predicted_s = costs_of(apart, q_len=rows, kv_len=keys, heads=heads).cost(op).seconds
    band = Band(0, 1, 1, 0, None) if masked else None
    taken_s = TimedTiles(RATE, 8).seconds((1, rows, heads, 64), keys, band, FLOPS[kernel] * 64)
    if kernel == "attend":
        # in a ring of 8: two passes of 12 and 14 bytes an element, of which the model has 10 in reset and finish
        taken_s += 2 * heads * 64 * rows / 100e9
    else:
        # three sums, each in and out in float32, of what comes in bfloat16
        taken_s += 10 * heads * 64 * (rows + 2 * keys) / 100e9
    assert predicted_s == pytest.approx(taken_s, rel=0.04)


RINGS = [
    ({"q_len": 8192, "heads": 8, "mask": Causal()}, "zigzag"),
    ({"q_len": 6000, "heads": 16, "mask": Causal(), "pass_": "both"}, "zigzag"),
    ({"q_len": 8192, "heads": 16, "kv_heads": 4, "pass_": "both"}, "contiguous"),
    ({"q_len": 20000, "heads": 4, "mask": Causal()}, "striped"),
    ({"q_len": 12288, "heads": 16, "kv_heads": 16}, "contiguous"),
]


@pytest.mark.parametrize(("work", "partition"), RINGS)
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "together"])
def test_rings_that_calibration_did_not_see(apart, together, work, partition, shared):
    truth, values, world_size = (SHARED, together, 3) if shared else (TRUTH, apart, 2)
    workload = Workload(head_dim=64, dtype="bfloat16", **work)
    schedule = Schedule(workload=workload, world_size=world_size, partition=partition)
    measured_s = ring_s(truth, schedule, **(LOSS if shared else {}))
    assert simulate(schedule, machine(values)).total_s == pytest.approx(measured_s, rel=0.04)


def test_partial_outputs_that_are_folded_are_priced(apart):
    """A ring of many tiles on one rank: without the price of folding the prediction would be as much too short as that takes."""
    form = Form(512, 16, 16)
    ops = forward_ops(KERNEL, form)

    def run(endpoint):
        subject = subject_of(endpoint)
        room = Room(8, 2**29)
        trial = Trial(name="attend", kernel=KERNEL, watch=Watch.of(subject.make_backend(), room), room=room)
        return trial.bench(form).device_s("a ring", "reset", *["attend"] * 12, "finish")

    measured_s = World(topology.parse(TRUTH), 1).run(run)[0]
    with_price, without = (costs_of(values, q_len=512, heads=16, batch=16) for values in (apart, _unpriced(apart)))
    predicted = [
        costs.cost(ops["reset"]).seconds + 12 * costs.cost(ops["attend"]).seconds + costs.cost(ops["finish"]).seconds
        for costs in (with_price, without)
    ]
    assert predicted[0] == pytest.approx(measured_s, rel=0.02)
    assert abs(predicted[0] - measured_s) < abs(predicted[1] - measured_s) / 2


def _unpriced(values):
    device = only(values)
    table = {name: value for name, value in device["attention"][0].items() if name != "pass_bandwidth"}
    return values | {
        "devices": {"gpu": device | {"attention": [table]}},
        "machine": "gpu",
        "transports": {"t": {"progress": "offload"}},
    }


# noise, and what cannot be measured


def noisy(noise, **changed):
    """One pass of one kernel on a device whose event times scatter by so much."""

    def run(endpoint):
        room = Room(changed.get("units", 8), changed.get("nbytes", 2**29))
        watch = Watch.of(subject_of(endpoint).make_backend(), room)
        return measure_pass(Trial(name="attend", kernel=KERNEL, watch=watch, room=room), 100e9)

    return World(topology.parse(TRUTH), 1, noise=noise, host_s=changed.get("host_s", 8e-6)).run(run)[0]


def test_a_slow_host_does_not_make_a_device_slow(few):
    """Launches are queued ahead of the device: what it takes does not depend on what they take."""
    fast, slow = noisy(0.0), noisy(0.0, host_s=60e-6)
    assert slow.overhead_s == pytest.approx(fast.overhead_s, rel=0.01)
    assert slow.pass_bytes_per_s == pytest.approx(fast.pass_bytes_per_s, rel=0.01)
    assert slow.per_pair_s == pytest.approx(fast.per_pair_s, rel=0.01)


def test_what_the_host_takes_to_launch_is_known_too(few):
    def run(endpoint):
        room = Room(8, 2**29)
        return measure_launch(Watch.of(subject_of(endpoint).make_backend(), room), KERNEL, room)

    assert World(topology.parse(TRUTH), 1, host_s=60e-6).run(run) == [pytest.approx(60e-6, rel=0.01)]


def test_medians_of_noisy_times_are_near(few):
    quiet, loud = noisy(0.0), noisy(0.04)
    for key, seconds in loud.per_pair_s.items():
        assert seconds == pytest.approx(quiet.per_pair_s[key], rel=0.1)


def test_times_that_do_not_settle_are_an_error(few):
    with pytest.raises(
        CalibrationError, match=r"attend, bfloat16 head_dim 64, .*: times from .* us in 4 tries: is another program"
    ):
        noisy(1.0)


def test_a_clock_that_stands_still_is_an_error(few):
    def run(endpoint):
        calls, make_backend = backend_of(endpoint, RATE)
        watch = Watch.of(make_backend(), Room(8, 2**29))
        calls.elapsed_s = lambda first, last: 0.0
        return watch.launched_s(lambda turn: None, "nothing")

    with pytest.raises(CalibrationError, match="nothing: times from 0 to 0 us"):
        World(topology.parse(TRUTH), 1).run(run)


def test_a_device_without_room_for_a_wave_is_an_error():
    with pytest.raises(CalibrationError, match="hold no tiles of 512 rows for 4096 units: leave the device more"):
        noisy(0.0, units=4096, nbytes=2**24)


def test_tiles_stop_where_memory_does(monkeypatch):
    """What a smaller memory does not hold is not measured; what it holds is as it is."""
    monkeypatch.setattr(device_times, "ROWS", (512, 16384))
    small, large = noisy(0.0, nbytes=2**24), noisy(0.0)
    assert 0 < len(small.per_pair_s) < len(large.per_pair_s)
    for key, seconds in small.per_pair_s.items():
        assert seconds == pytest.approx(large.per_pair_s[key], rel=0.02)


def calibrating(truth, world_size, spoil=lambda endpoint, subject: None, **world):
    """What each rank is told where calibration fails."""

    def run(endpoint):
        subject = subject_of(endpoint)
        spoil(endpoint, subject)
        with pytest.raises((CalibrationError, DeviceError)) as raised:
            measure_devices(subject, [KERNEL])
        return str(raised.value)

    return World(topology.parse(truth), world_size, **world).run(run)


def test_ranks_on_several_hosts_are_refused():
    said = calibrating(TRUTH, 2, hosts=["here", "there"])
    assert set(said) == {"a topology describes one node here, and the ranks run on 2 hosts: calibrate on one"}


def test_one_rank_is_refused():
    assert calibrating(TRUTH, 1)[0].startswith("a hop needs two ranks: start with mpiexec -n P")


def test_an_engine_that_says_nothing_of_its_device_is_refused():
    said = calibrating(TRUTH, 2, lambda endpoint, subject: subject.facts.pop("units"))
    assert said[0] == "the engine does not say units of its device: use --backend cupy"


def test_a_transport_that_declares_nothing_is_refused(few):
    def spoil(endpoint, subject):
        del endpoint.progress

    assert "transport 'paper' does not declare its `progress`" in calibrating(TRUTH, 2, spoil)[0]


def test_every_rank_learns_that_one_could_not_measure(few):
    def spoil(endpoint, subject):
        if endpoint.rank == 1:
            subject.make_backend().calls  # noqa: B018
            object.__setattr__(subject, "matmul", fail)

    def fail(a, b, c, stream):
        raise DeviceError("cuBLAS is in a bad mood")

    assert calibrating(TRUTH, 2, spoil) == ["rank 1: cuBLAS is in a bad mood", "cuBLAS is in a bad mood"]
