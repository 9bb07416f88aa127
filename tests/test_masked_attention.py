"""Attention under every mask against dense float64; packed sequences and masks through the library and the command line."""

import itertools
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import ringsim
from ringsim import BlockSparse, Causal, Documents, First, PrefixLM, Window, mask_named
from ringsim.backends.loopback import spawn
from ringsim.backends.numpy import NumpyBackend
from ringsim.cli.main import cli
from ringsim.errors import RankMismatch, WorkloadError
from ringsim.lowering import Blocking
from ringsim.mask import shortened
from ringsim.partition import KINDS
from ringsim.reference import dense_attention
from ringsim.workload import Workload

SEQ = 61
COMMAND = ["schedule", "--ranks", "4"]
BLOCKS = np.random.default_rng(5).random((8, 11)) < 0.4
MASKS = [
    Window(9, 0),
    Window(4, 7),
    Window(right=3, left=None),
    Causal() & (First(3) | Window(8)),
    Causal() & Documents((5, 1, 20, 7, 28)),
    Documents((13, 9)) & (Causal() | First((4, 2), (0, 13))),
    PrefixLM(17),
    BlockSparse(BLOCKS, 8, 6),
    Causal() & BlockSparse(BLOCKS, 8, 6),
    ~Causal() & Window(None, 12),
    ~mask_named("full"),
]


def workload(mask, **other):
    shape = {"q_len": SEQ, "batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "v_head_dim": 6, "dtype": "float64"}
    return ringsim.Workload(**(shape | other), mask=mask)


def inputs(work, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (
        (work.batch, work.q_len, work.heads, work.head_dim),
        (work.batch, work.kv_len, work.kv_heads, work.head_dim),
        (work.batch, work.kv_len, work.kv_heads, work.v_head_dim),
    )
    return [rng.standard_normal(shape).astype(work.dtype) for shape in shapes]


def agrees(work, partition, world_size, blocking):
    q, k, v = inputs(work)
    out, lse = dense_attention(work, q, k, v)
    schedule = ringsim.Schedule(workload=work, world_size=world_size, partition=partition)
    result = ringsim.execute(schedule, q, k, v, backend=NumpyBackend(blocking=blocking))
    np.testing.assert_allclose(result.out, out, rtol=0, atol=1e-12)
    np.testing.assert_allclose(result.lse, lse, rtol=0, atol=1e-12)
    return out, lse


@pytest.mark.parametrize("partition", KINDS)
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: shortened(mask.name, 30))
def test_a_ring_agrees_with_dense_attention(mask, partition):
    work = workload(mask)
    for world_size, blocking in ((1, Blocking(q_rows=16, k_rows=6, edge_rows=4)), (3, Blocking(q_rows=7, k_rows=5, edge_rows=3))):
        out, lse = agrees(work, partition, world_size, blocking)
    positions = np.arange(SEQ)
    blind = ~mask.visible(positions, positions).any(axis=1)
    assert (out[:, blind] == 0).all()
    assert np.isneginf(lse[:, :, blind]).all()
    assert np.isfinite(lse[:, :, ~blind]).all()


@settings(max_examples=40, deadline=None)
@given(
    mask=st.sampled_from(MASKS),
    partition=st.sampled_from(KINDS),
    world_size=st.integers(1, 9),
    q_len=st.integers(1, 40),
    dtype=st.sampled_from(("float64", "float64")),
)
def test_a_ring_of_any_size_agrees_on_the_last_queries_of_a_context(mask, partition, world_size, q_len, dtype):
    work = workload(mask, q_len=q_len, kv_len=SEQ, q_offset=SEQ - q_len, dtype=dtype, batch=1)
    agrees(work, partition, world_size, Blocking(q_rows=9, k_rows=4, edge_rows=3))


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: shortened(mask.name, 30))
def test_a_schedule_covers_each_visible_pair_once(mask):
    for partition in KINDS:
        ringsim.Schedule(workload=workload(mask, q_len=61), world_size=4, partition=partition).validate()


def test_rows_of_the_reference_come_in_parts_without_a_change(monkeypatch):
    work = workload(Causal() & Window(9))
    whole = dense_attention(work, *inputs(work))
    monkeypatch.setattr("ringsim.reference.PAIRS_AT_ONCE", 200)
    for part, all_at_once in zip(dense_attention(work, *inputs(work)), whole, strict=True):
        np.testing.assert_allclose(part, all_at_once, rtol=0, atol=1e-14)


def packed(work):
    return [x[0] for x in inputs(work)]


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("partition", KINDS)
def test_packed_documents_on_several_ranks(world_size, partition):
    cu_seqlens = np.array([0, 5, 5, 6, 26, 33, SEQ], np.int32)
    work = workload(Causal() & Documents.from_cu_seqlens(cu_seqlens), batch=1)
    q, k, v = packed(work)
    out, lse = (x[0] for x in dense_attention(work, q[None], k[None], v[None]))
    for begin, end in pairwise(cu_seqlens):
        alone = ringsim.ring_attention(*(x[begin:end] for x in (q, k, v)), causal=True) if end > begin else 0
        np.testing.assert_allclose(out[begin:end], alone, atol=1e-12)

    def rank(comm):
        local = [ringsim.shard(x, comm=comm, partition=partition, axis=0) for x in (q, k, v)]
        options = {"comm": comm, "partition": partition}
        given_out = np.empty((*local[0].shape[:2], v.shape[2]))
        results = [
            ringsim.ring_attention(*local, causal=True, cu_seqlens=cu_seqlens, out=given_out, return_lse=True, **options),
            ringsim.ring_attention(*local, mask=work.mask, cu_seqlens=list(map(int, cu_seqlens)), return_lse=True, **options),
            ringsim.ring_attention(*local, mask="documents(5, 1, 20, 7, 28)", causal=True, return_lse=True, **options),
        ]
        assert results[0][0] is given_out
        with ringsim.RingAttention(work, **options) as plan:
            results.append(plan.with_lse(*local))
            given_out = np.empty_like(given_out)
            assert plan(*local, out=given_out) is given_out
            assert np.array_equal(given_out, results[-1][0])
            assert np.array_equal(plan(*(x[None] for x in local))[0], given_out)
        whole = partial(ringsim.unshard, comm=comm, partition=partition)
        return [(whole(out, axis=0), whole(lse, axis=1)) for out, lse in results]

    for results in spawn(world_size, rank):
        for one_out, one_lse in results:
            np.testing.assert_allclose(one_out, out, rtol=0, atol=1e-12)
            np.testing.assert_allclose(one_lse, lse, rtol=0, atol=1e-12)


def test_causal_mask_and_cu_seqlens_hold_together():
    work = workload(Causal() & Window(6) & Documents((20, 41)), batch=2)
    q, k, v = inputs(work)
    out = ringsim.ring_attention(q, k, v, causal=True, mask="window(6)", cu_seqlens=[0, 20, SEQ])
    np.testing.assert_allclose(out, dense_attention(work, q, k, v)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("cu_seqlens", "said"),
    [
        ([0, 20], "cu_seqlens end at 20, the ranks hold 61 tokens in all"),
        ([0, 20, 70], "cu_seqlens end at 70, the ranks hold 61 tokens in all"),
        ([1, 61], "cu_seqlens begin with 1"),
        ([], "cu_seqlens are empty"),
        ([0, 30, 20, 61], "cu_seqlens fall from 30 to 20"),
        ([0, 20.5, 61], r"cu_seqlens are float64\(3,\)"),
        ([[0, 61]], r"cu_seqlens are int64\(1, 2\)"),
        (np.array([0.0, 61.0]), r"cu_seqlens are float64\(2,\)"),
        (object(), "cu_seqlens is object"),
    ],
)
def test_wrong_cu_seqlens_are_refused_on_every_rank(cu_seqlens, said):
    q, k, v = packed(workload(Causal(), batch=1))

    def rank(comm):
        local = [ringsim.shard(x, comm=comm, axis=0) for x in (q, k, v)]
        with pytest.raises((RankMismatch, WorkloadError), match=said):
            ringsim.ring_attention(*local, comm=comm, cu_seqlens=cu_seqlens)
        return True

    assert spawn(2, rank, timeout_s=20) == [True, True]


def test_cu_seqlens_want_as_many_keys_as_queries():
    q, k, v = packed(workload(Causal(), batch=1))
    with pytest.raises(WorkloadError, match="cu_seqlens end at 61, the ranks hold 30 queries and 61 keys in all"):
        ringsim.ring_attention(q[:30], k, v, cu_seqlens=[0, 61])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mask": Window(3)}, r"rank 1: mask is causal & window\(3\) where rank 0 has causal"),
        ({"causal": False}, "rank 1: mask is full where rank 0 has causal"),
        ({"mask": "windowed(3)"}, "rank 1: unknown mask 'windowed'"),
        ({"mask": 7}, "rank 1: mask is int; give a mask"),
        ({"cu_seqlens": [0, 9]}, r"rank 1: mask is causal & documents\(9\) where rank 0 has causal"),
        ({"packed": True}, r"rank 1: q is float64\(..., 4, 8\) where rank 0 has float64\(1, ..., 4, 8\)"),
        ({"q": 0}, "q has 3 dimensions, k has 4 dimensions, v has 4 dimensions; all must be"),
    ],
)
def test_ranks_that_see_differently_are_told_so(change, said):
    q, k, v = inputs(workload(Causal(), batch=1))

    def rank(comm):
        local = [ringsim.shard(x, comm=comm) for x in (q, k, v)]
        options = {"causal": True}
        if comm.rank == 1:
            if "packed" in change:
                local = [x[0] for x in local]
            elif "q" in change:
                local[0] = local[0][0]
            else:
                options |= change
        with pytest.raises(RankMismatch, match=said):
            ringsim.ring_attention(*local, comm=comm, **options)
        return True

    assert spawn(3, rank, timeout_s=20) == [True] * 3


def test_long_masks_that_differ_are_shown_where_they_do():
    lengths = [[3 + i % 5 for i in range(400)] for _ in range(2)]
    lengths[1][200] += 1

    def rank(comm):
        with pytest.raises(RankMismatch, match=r"mask is \.\.\..* 4.*\.\.\. where rank 0 has \.\.\.") as caught:
            ringsim.RingAttention(workload(Documents(lengths[comm.rank]), q_len=2001), comm=comm)
        assert len(str(caught.value)) < 250
        return True

    assert spawn(2, rank, timeout_s=20) == [True, True]


def test_packed_arrays_are_of_one_sequence():
    work = workload(Causal(), batch=2)
    with pytest.raises(RankMismatch, match=r"q is float64\(1, 61, 4, 8\), expected float64\(2, 61, 4, 8\)"):
        ringsim.RingAttention(work)(*packed(work))
    with pytest.raises(RankMismatch, match=r"q has 2 dimensions .* or \(tokens, heads, head_dim\) for one sequence"):
        ringsim.ring_attention(*(x[0, 0] for x in inputs(work)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mask", "window(4K,0)"], "float32, window(4096, 0)"),
        (["--causal", "--mask", "documents(16, 3x8, 24)"], "float32, causal & documents(16, 3x8, 24)"),
        (["--full", "--mask", "causal"], "float32, causal"),
        (["--causal"], "float32, causal"),
        (["--mask", "documents(" + "1, 2, " * 12 + "1)"], "documents(1, 2, 1, 2, 1, 2, 1..."),
    ],
)
def test_masks_on_the_command_line(arguments, said):
    found = CliRunner().invoke(cli, [*COMMAND, "--seq", "64", *arguments])
    assert found.exit_code == 0, found.output
    assert said in " ".join(found.output.split())


def test_a_masked_run_is_checked():
    found = CliRunner().invoke(
        cli, ["run", "--seq", "64", "--repeats", "1", "--check", "--mask", "causal & documents(16, 3x8, 20)"]
    )
    assert found.exit_code == 0, found.output
    assert "check: right" in found.output


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ("casual", "unknown mask 'casual'; known: full, causal"),
        ("documents(1K)", "mask documents(1024) describes 1024 tokens, the sequence has 64"),
    ],
)
def test_a_wrong_mask_on_the_command_line_is_one_clear_error(mask, said):
    found = CliRunner().invoke(cli, [*COMMAND, "--seq", "64", "--mask", mask])
    assert found.exit_code != 0
    assert said in " ".join(str(found.output or found.exception).split())


def test_a_mask_in_a_workload_file(tmp_path):
    file = tmp_path / "packed.yaml"
    file.write_text("seq: 64\ncausal: true\nmask: documents(16, 3x8, 24) | first(2)\n")
    for arguments, said in (
        ([], "causal & (first(2) | documents(16, 3x8, 24))"),
        (["--mask", "window(5)"], "causal & window(5)"),
    ):
        found = CliRunner().invoke(cli, [*COMMAND, "--workload", str(file), *arguments])
        assert found.exit_code == 0, found.output
        assert said in " ".join(found.output.split())


@pytest.mark.parametrize("strategy", ["ring", "q-ring", "token-ring"])
def test_balanced_shards_need_the_mask_and_fit_the_call(strategy):
    length, documents = 37, (5, 15, 17)
    bounds, text = [0, *itertools.accumulate(documents)], "causal & documents(5, 15, 17)"
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((length, heads, 8)) for heads in (4, 2, 2))

    def run(endpoint):
        shards = [ringsim.shard(x, comm=endpoint, partition="balanced", mask=text, axis=0) for x in (q, k, v)]
        options = {"comm": endpoint, "partition": "balanced", "strategy": strategy}
        out = ringsim.ring_attention(*shards, causal=True, cu_seqlens=bounds, **options)
        return ringsim.unshard(out, comm=endpoint, partition="balanced", mask=text, axis=0)

    work = Workload(q_len=length, heads=4, kv_heads=2, head_dim=8, dtype="float64", mask=mask_named(text))
    right, _ = dense_attention(work, q[None], k[None], v[None])
    for out in spawn(3, run):
        np.testing.assert_allclose(out, right[0], rtol=0, atol=1e-12)
    for call in (ringsim.shard, ringsim.unshard):
        with pytest.raises(WorkloadError, match="depends on the mask"):
            call(q, partition="balanced", axis=0)


@pytest.mark.parametrize(
    ("mine", "others", "said"),
    [
        ({"partition": "zigzag"}, {"partition": "contiguous"}, "partition is zigzag where rank"),
        ({"axis": 2}, {"axis": 1}, "axis is 2 where rank"),
        ({"partition": "balanced", "mask": "causal"}, {"partition": "balanced", "mask": "full"}, "mask is causal where rank"),
        (
            {"partition": "balanced"},
            {"partition": "balanced", "mask": "full"},
            "rank 0: partition 'balanced' depends on the mask",
        ),
        ({"mask": np.tri(4)}, {}, "rank 0: mask is ndarray; give a mask of ringsim or its text"),
    ],
)
def test_ranks_that_unshard_differently_are_all_told_so(mine, others, said):
    def run(endpoint):
        with pytest.raises(RankMismatch, match=said):
            ringsim.unshard(np.zeros((1, 8, 8, 4)), comm=endpoint, **(others if endpoint.rank else mine))

    spawn(3, run)


def test_a_mask_of_the_wrong_type_on_one_rank_is_told_to_all():
    def run(endpoint):
        q = np.zeros((1, 4, 1, 8))
        with pytest.raises(RankMismatch, match=r"rank 0: mask is ndarray; .* ringsim.BlockSparse takes a boolean map"):
            ringsim.ring_attention(q, q, q, comm=endpoint, mask="causal" if endpoint.rank else np.tri(8))

    spawn(2, run)


def test_k_and_v_of_unequal_rows_are_named():
    def run(endpoint):
        q, k = np.zeros((1, 20, 1, 8)), np.zeros((1, 20 - endpoint.rank, 1, 8))
        with pytest.raises(RankMismatch, match="rank 1: k has 19 rows and v 20"):
            ringsim.ring_attention(q, k, q, comm=endpoint)

    spawn(2, run)
