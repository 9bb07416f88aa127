"""What fits a machine: demands on each device, the longest context, and the commands that say so."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import ringsim
from ringsim import capacity, ledger
from ringsim.backends.cpu import available_memory
from ringsim.capacity import demands, longest, longest_ring, tightest
from ringsim.cli.main import cli, main
from ringsim.errors import RingsimError, TopologyError, WorkloadError
from ringsim.footprint import FeedForward, weigh, weigh_blockwise
from ringsim.units import parse

LAYER = ["--heads", "32", "--kv-heads", "8", "--head-dim", "128", "--dtype", "bf16"]


def bf16(seq, *, heads=32, head_dim=128, **more):
    return ringsim.Workload(q_len=seq, heads=heads, head_dim=head_dim, dtype="bfloat16", **more)


def ideal(memory, **settings):
    return ringsim.load_topology("ideal", {"devices.ideal.memory": memory} | settings)


def test_the_longest_context_fits_and_the_next_does_not():
    schedule = ringsim.Schedule(workload=bf16(8192, kv_heads=8), world_size=8)
    on = ideal("80 GB")
    most = longest_ring(schedule, on)
    assert most % 1024 == 0
    for tokens, fits in ((most, True), (most + 1024, False)):
        longer = replace(schedule, workload=capacity.of_length(schedule.workload, tokens))
        assert all(demand.fits for demand in demands(longer, on)) is fits


LENGTHS = st.sampled_from([1, 3, 5, 64, 4096])


@given(
    seq=LENGTHS,
    ranks=st.integers(1, 6),
    causal=st.booleans(),
    partition=st.sampled_from(["contiguous", "zigzag", "striped"]),
    memory=st.integers(1, 400),
    decode=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_longest_context_is_that_of_brute_force(seq, ranks, causal, partition, memory, decode):
    """Whatever the length that it is asked at, and for a few queries at the end of a cache too."""
    mask = ringsim.Causal() if causal else ringsim.Full()
    more = {"kv_len": seq + 64, "q_offset": 64} if decode else {}
    work = ringsim.Workload(q_len=seq, heads=2, kv_heads=1, head_dim=64, dtype="bfloat16", mask=mask, **more)
    schedule = ringsim.Schedule(workload=work, world_size=ranks, partition=partition)
    on = ideal(f"{memory} MB")

    def fits(tokens):
        longer = replace(schedule, workload=capacity.of_length(work, tokens))
        return all(demand.fits for demand in demands(longer, on))

    most = longest_ring(schedule, on)
    assert most == 0 or fits(most)
    assert not fits(most + 1024)


def test_a_query_over_a_cache_stays_at_its_end():
    work = ringsim.Workload(q_len=1024, kv_len=65536, q_offset=64512, mask=ringsim.Causal())
    longer = capacity.of_length(work, 2**20)
    assert (longer.q_len, longer.kv_len, longer.q_offset) == (1024, 2**20, 2**20 - 1024)
    assert capacity.of_length(replace(work, q_offset=0, kv_len=1024), 2048).q_len == 2048


@given(slope=st.integers(1, 10**6), offset=st.integers(0, 10**9), step=st.integers(0, 10**6), capacity_=st.integers(0, 10**12))
@settings(max_examples=200, deadline=None)
def test_longest_is_the_last_that_fits(slope, offset, step, capacity_):
    looked = []

    def nbytes(tokens):
        looked.append(tokens)
        return offset + slope * tokens + step * (tokens // 4096)

    most = longest(nbytes, capacity_)
    assert most % 1024 == 0
    assert most == 0 or nbytes(most) <= capacity_
    assert most == 2**40 or nbytes(most + 1024) > capacity_
    # to weigh a context far beyond what fits would take for ever
    assert max(looked) <= max(2**20, 1.1 * most + 2048)
    assert len(looked) < 60


def test_reserved_memory_and_the_feed_forward_leave_less():
    schedule = ringsim.Schedule(workload=bf16(8192), world_size=8)
    on = ideal("80 GB")
    whole = longest_ring(schedule, on)
    assert longest_ring(schedule, on, reserve_nbytes=parse("40 GB", "size")) == pytest.approx(whole / 2, rel=0.01)
    assert longest_ring(schedule, on, reserve_nbytes=parse("80 GB", "size")) == 0
    with pytest.raises(TopologyError, match="90 GB are reserved of ideal-0, which has 80 GB"):
        longest_ring(schedule, on, reserve_nbytes=parse("90 GB", "size"))
    wide = longest_ring(schedule, on, feed_forward=FeedForward(dim=16 * 4096))
    by_blocks = longest_ring(schedule, on, feed_forward=FeedForward(dim=16 * 4096, block=1024))
    assert wide < by_blocks == whole


def test_ranks_that_share_a_device_share_its_memory():
    settings = {"devices.ideal.inside": "wire"}
    on = ringsim.load_topology("ideal", settings | {"devices.ideal.memory": "1 GB"}, place=[0, 0, 0, 1])
    found = demands(ringsim.Schedule(workload=bf16(8192), world_size=4), on)
    assert [len(demand.ranks) for demand in found] == [3, 1]
    assert found[0].nbytes == 3 * found[1].nbytes
    assert tightest(found) is found[0]


def test_heterogeneous_devices_are_each_asked():
    text = """
ringsim: 2
name: two-kinds
source: "defined: a test"
devices:
  big: {kind: gpu, memory: 80 GB, memory_bandwidth: 1 TB/s}
  small: {like: big, memory: 8 GB}
links: {wire: {bandwidth: 1 GB/s, latency: 1 us}}
transports: {direct: {progress: offload}}
machine: {join: switch, link: wire, of: [big, small]}
"""
    on = ringsim.topology.parse(text)
    schedule = ringsim.Schedule(workload=bf16(8192), world_size=2)
    assert tightest(demands(schedule, on)).kind == "small"
    alike = ringsim.topology.parse(text.replace("8 GB}", "80 GB}"))
    assert longest_ring(schedule, alike) > 9 * longest_ring(schedule, on)
    silent = ringsim.topology.parse(text.replace("memory: 80 GB", "memory: 1 MB").replace("memory: 8 GB", "memory: null"))
    assert silent.spec.devices["small"].memory is None
    assert [demand.fits for demand in demands(schedule, silent)] == [False, None]
    assert tightest(demands(schedule, silent)).fits is False
    assert longest_ring(schedule, silent) == 0


def test_beyond_64_ranks_a_sample_stands_for_all():
    on = ideal("80 GB", gpus=96)
    for mask, partition in ((ringsim.Full(), "contiguous"), (ringsim.Causal(), "contiguous"), (ringsim.Causal(), "zigzag")):
        schedule = ringsim.Schedule(workload=replace(bf16(96 * 64 + 5), mask=mask), world_size=96, partition=partition)
        most = max(weigh(schedule, rank).nbytes for rank in range(96))
        (found,) = {demand.nbytes for demand in demands(schedule, on)}
        assert most <= found <= most * (1 + 2 / 64)


def test_a_device_without_memory_is_said_to_be_unknown():
    schedule = ringsim.Schedule(workload=bf16(8192), world_size=8)
    on = ringsim.load_topology("ideal")
    assert longest_ring(schedule, on) is None
    assert tightest(demands(schedule, on)).fits is None


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"dim": 8, "block": 0}])
def test_a_feed_forward_needs_units(wrong):
    with pytest.raises(WorkloadError, match="1 or more"):
        FeedForward(**wrong)


def test_a_window_needs_keys():
    with pytest.raises(RingsimError, match="window is 0"):
        weigh_blockwise(bf16(64), window=0)


def test_a_control_group_limits_what_a_host_has(tmp_path):
    whole = available_memory(())
    limit = tmp_path / "memory.max"
    for text, found in (("max\n", whole), ("1000000\n", 1000000), (f"{2**62}\n", whole)):
        limit.write_text(text)
        assert available_memory((str(limit), str(tmp_path / "none"))) == found


# the commands


def ringsim_command(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_memory_prints_every_class_and_the_longest_context(tmp_path):
    where = tmp_path / "memory.json"
    done = ringsim_command("memory", "dgx-h100", "--seq", "1M", *LAYER, "--window", "4K", "--ffn-dim", 16384, "--json", where)
    assert done.exit_code == 0, done.output
    for word in ("q", "k, v", "in flight", "output", "partial output", "statistics", "scores", "activations", "peak", "longest"):
        assert f"\n{word}" in done.output
    (facts,) = json.loads(where.read_text())["accounts"]
    methods = {found["method"]: found for found in facts["footprints"]}
    assert list(methods) == ["ring", "blockwise", "window", "dense"]
    assert methods["ring"]["classes"]["q"] * 8 == methods["blockwise"]["classes"]["q"] == 2**20 * 32 * 128 * 2
    assert methods["window"]["classes"]["k, v"] == 4096 * 8 * 128 * 2 * 2
    assert facts["longest_context_tokens"]["dense"] < facts["longest_context_tokens"]["blockwise"]
    assert facts["longest_context_tokens"]["blockwise"] < facts["longest_context_tokens"]["ring"]


def test_memory_compares_machines():
    done = ringsim_command("memory", "dgx-h100", "ideal", "--seq", "1M", *LAYER)
    assert done.exit_code == 0
    rows = {line.split()[0]: line for line in done.output.splitlines() if line}
    assert set(rows) >= {"machine", "dgx-h100", "ideal"}
    assert "unknown" in rows["ideal"]
    assert "no weights" in done.output


@pytest.mark.parametrize("ranks", [3, 96])
def test_the_table_is_of_the_rank_that_needs_the_most(ranks):
    on = ideal("80 GB", gpus=ranks)
    schedule = ringsim.Schedule(workload=replace(bf16(ranks * 64), mask=ringsim.Causal()), world_size=ranks)
    found = ledger.account(schedule, on)
    assert found.footprints[0].nbytes == found.demand.nbytes
    assert found.footprints[0].classes["in flight"] > 0
    assert found.footprints[0].rank > 1


def test_no_limit_is_no_number():
    work = ringsim.Workload(q_len=1, kv_len=4096, q_offset=4095, heads=8, head_dim=64, dtype="bfloat16")
    found = ledger.account(ringsim.Schedule(workload=work, world_size=2), ideal("1 GB", gpus=2), window=512)
    assert ledger.tokens(found.longest["window"]) == "no limit"
    assert ledger.tokens(found.longest["ring"]).endswith("K")
    assert (ledger.tokens(0), ledger.tokens(1024), ledger.tokens(None)) == ("none", "1K", "unknown")


def test_what_is_reserved_is_said(tmp_path):
    where = tmp_path / "facts.json"
    done = ringsim_command("memory", "dgx-h100", "--seq", "1M", *LAYER, "--reserve", "40GB", "--json", where)
    assert "85.52 GB, 40 GB reserved" in done.output
    facts = json.loads(where.read_text())["accounts"][0]["tightest"]
    assert (facts["memory_nbytes"], facts["reserve_nbytes"]) == (81559 * 2**20, 40e9)


def test_unknown_scratch_is_said():
    done = ringsim_command("memory", "laptop", "--seq", "8K", "--heads", 8, "--head-dim", 64, "--dtype", "bf16")
    assert "scratch is unknown: laptop has no attention figures for this dtype and head_dim" in done.output
    assert "4 ranks on it" in done.output
    known = ringsim_command("memory", "laptop", "--seq", "8K", "--heads", 8, "--head-dim", 64)
    assert "unknown" not in known.output


def test_simulate_says_when_a_workload_does_not_fit(tmp_path):
    where = tmp_path / "facts.json"
    arguments = ("simulate", "dgx-h100", "--seq", "64K", *LAYER, "--json", where)
    assert "memory: its rank needs" in ringsim_command(*arguments).output
    assert json.loads(where.read_text())["memory"]["fits"] is True
    done = ringsim_command(*arguments, "--set", "devices.h100.memory=200 MB")
    assert "DOES NOT FIT" in done.output
    assert "the longest context that fits: 34K" in done.output
    facts = json.loads(where.read_text())["memory"]
    assert facts["fits"] is False
    assert facts["longest_context_tokens"] == 34 * 1024
    unknown = ringsim_command("simulate", "ideal", "--seq", "64K", *LAYER)
    assert "the machine has no `memory` for ideal" in unknown.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--reserve", "20"), "'20' has no unit"),
        (("--reserve", "20 GB/s"), "no unit of size"),
        (("--ffn-block", "1K"), "--ffn-block needs --ffn-dim"),
        (("--window", "0"), "window is 0"),
        (("--ranks", "9"), "has room for 8 ranks, not 9"),
        (("--reserve", "100 GB"), "100 GB are reserved of h100-0, which has 85.52 GB"),
        (("--batch", "0"), "there is nothing to weigh"),
        (("--seq", "0"), "there is nothing to weigh"),
    ],
)
def test_bad_input_is_one_message(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        main(["memory", "dgx-h100", "--seq", "64K", *LAYER, *arguments])
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.err.startswith("ringsim: ")
    assert said in captured.err
    assert "Traceback" not in captured.err


def test_what_is_of_one_length_has_no_longest_context():
    documents = replace(bf16(8192), mask=ringsim.Causal() & ringsim.Documents((4096, 4096)))
    for work, partition in ((documents, "balanced"), (bf16(8192), "runs(0:4096, 1:4096)")):
        schedule = ringsim.Schedule(workload=work, world_size=2, partition=partition)
        account = ledger.account(schedule, ringsim.load_topology("dgx-h100"))
        assert account.demand.fits and set(account.longest.values()) == {None}
    done = ringsim_command(
        "simulate", "dgx-h100", "--seq", "32M", "--heads", 32, "--head-dim", 128, "--dtype", "bf16", "--mask", "documents(16x2M)"
    )
    assert "DOES NOT FIT" in done.output and "longest context that fits: unknown" in done.output


def test_the_strategy_dense_goes_by_another_name_than_dense_scores():
    schedule = ringsim.Schedule(workload=bf16(8192), world_size=1, strategy="dense")
    account = ledger.account(schedule, ringsim.load_topology("dgx-h100"))
    assert [one.method for one in account.footprints] == ["dense, block by block", "blockwise", "dense"]
    assert account.longest["dense, block by block"] == account.longest["blockwise"] > account.longest["dense"]
