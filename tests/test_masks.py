"""Masks: pieces against the dense mask, compositions, complements, and the way through text."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim.errors import WorkloadError
from ringsim.mask import BlockSparse, Causal, Documents, First, Full, PrefixLM, Window, both, either, mask_named, shortened
from ringsim.partition import Partition
from ringsim.tile import Span
from ringsim.workload import Workload

MANY = settings(max_examples=400, deadline=None)
FEW = settings(max_examples=60, deadline=None)
COUNT = st.integers(0, 12)
SIDE = st.none() | COUNT


def maps():
    shape = st.tuples(st.integers(0, 6), st.integers(0, 6))
    return shape.flatmap(lambda s: st.lists(st.booleans(), min_size=s[0] * s[1], max_size=s[0] * s[1]).map(lambda b: drawn(b, s)))


def drawn(bits, shape):
    return np.array(bits, bool).reshape(shape)


SIMPLE = st.one_of(
    st.just(Full()),
    st.just(Causal()),
    st.builds(Window, SIDE, SIDE),
    st.builds(Documents, st.lists(COUNT, max_size=8)),
    st.builds(First, COUNT),
    st.lists(st.tuples(COUNT, st.integers(0, 40)), max_size=4).map(lambda r: First([c for c, _ in r], [s for _, s in r])),
    st.builds(PrefixLM, COUNT),
    st.builds(BlockSparse, maps(), st.integers(1, 7), st.integers(1, 7)),
)
MASKS = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner), st.builds(lambda a, b: a | b, inner, inner), inner.map(lambda a: ~a)
    ),
    max_leaves=4,
)


@st.composite
def pairs_of_spans(draw):
    """Two spans, as often as not of one step, as all ranks of a partition have them."""
    steps = [draw(st.integers(1, 6)) for _ in range(2)]
    if draw(st.booleans()):
        steps[1] = steps[0]
    return tuple(
        Span(row=draw(st.integers(0, 9)), count=draw(st.integers(0, 20)), start=draw(st.integers(-10, 50)), step=step)
        for step in steps
    )


def band(q, k, lo, hi):
    distance = q.positions()[:, None] - k.positions()[None, :]
    return (distance >= (distance if lo is None else lo)) & (distance <= (distance if hi is None else hi))


def check(pieces, q, k, visible):
    covered = np.zeros(visible.shape, int)
    for q_part, k_part, lo, hi in pieces:
        rows, columns = (slice(p.row - s.row, p.row - s.row + p.count) for p, s in ((q_part, q), (k_part, k)))
        assert q_part.positions().tolist() == q.positions()[rows].tolist()
        assert k_part.positions().tolist() == k.positions()[columns].tolist()
        seen = band(q_part, k_part, lo, hi)
        covered[rows, columns] += seen
        assert seen.any(), "a piece that holds no visible pair"
        assert (lo is None and hi is None) == seen.all(), "a piece is masked exactly where its band hides a pair"
        for edge in (seen[0], seen[-1], seen[:, 0], seen[:, -1]):
            assert edge.any(), "an outer row or key that holds no visible pair was left in"
    assert np.array_equal(covered, visible)


@MANY
@given(MASKS, pairs_of_spans())
def test_pieces_are_the_visible_pairs_once_each_and_hidden_the_others(mask, spans):
    visible = mask.visible(*(span.positions() for span in spans))
    assert visible.dtype == bool
    check(mask.pieces(*spans), *spans, visible)
    check(mask.hidden(*spans), *spans, ~visible)


@MANY
@given(MASKS)
def test_a_mask_survives_the_way_through_its_name_and_through_pickle(mask):
    for again in (mask_named(mask.name), pickle.loads(pickle.dumps(mask)), eval(repr(mask), {"mask_named": mask_named})):
        assert again == mask
        assert (hash(again), again.name, again.extent) == (hash(mask), mask.name, mask.extent)
    assert mask_named(f" ( {mask.name})").name == mask.name


@FEW
@given(st.lists(MASKS, min_size=1, max_size=4), st.randoms())
def test_the_order_of_terms_does_not_matter(masks, random):
    other = [*masks, masks[0]]
    random.shuffle(other)
    assert both(*masks) == both(*other)
    assert either(*masks) == either(*other)
    assert ~~masks[0] == masks[0]


@FEW
@given(MASKS, MASKS)
def test_the_algebra_is_that_of_sets(a, b):
    positions = np.arange(-3, 45)
    seen_a, seen_b = a.visible(positions, positions), b.visible(positions, positions)
    assert np.array_equal((a & b).visible(positions, positions), seen_a & seen_b)
    assert np.array_equal((a | b).visible(positions, positions), seen_a | seen_b)
    assert np.array_equal((~a).visible(positions, positions), ~seen_a)


def by_definition(see, size=40):
    return np.array([[see(p, j) for j in range(size)] for p in range(size)])


@pytest.mark.parametrize(
    ("text", "see"),
    [
        ("full", lambda p, j: True),
        ("causal", lambda p, j: j <= p),
        ("window(4)", lambda p, j: p - j <= 4),
        ("window(4, 0)", lambda p, j: 0 <= p - j <= 4),
        ("window(right=2)", lambda p, j: j - p <= 2),
        ("window(left=3, right=2)", lambda p, j: -2 <= p - j <= 3),
        (
            "documents(10, 2x5, 7)",
            lambda p, j: max(p, j) < 27 and np.array_equal(*(np.sum(x >= np.array([10, 15, 20])) for x in (p, j))),
        ),
        ("first(4)", lambda p, j: j < 4),
        ("first(4, 2@10)", lambda p, j: j < 4 or 10 <= j < 12),
        ("prefix(6)", lambda p, j: j <= p or j < 6),
        ("causal & (first(4) | window(8))", lambda p, j: j <= p and (j < 4 or p - j <= 8)),
        ("~causal", lambda p, j: j > p),
        ("causal | first(1) & window(2)", lambda p, j: j <= p or (j < 1 and p - j <= 2)),
    ],
)
def test_what_a_text_means(text, see):
    positions = np.arange(40)
    assert np.array_equal(mask_named(text).visible(positions, positions), by_definition(see))


def test_a_map_of_blocks_means_what_it_shows():
    blocks = np.array([[True, False, True], [False, True, False]])
    seen = BlockSparse(blocks, 8, 4).visible(np.arange(20), np.arange(14))
    assert np.array_equal(seen[:16, :12], np.kron(blocks, np.ones((8, 4), bool)))
    assert not seen[16:].any()
    assert not seen[:, 12:].any()


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (Causal() & Full(), "causal"),
        (Full() & Full(), "full"),
        (Causal() | Full(), "full"),
        (Causal() & Causal(), "causal"),
        (Documents((3, 0, 3, 5)) & Window(1024, 0) & Causal(), "causal & window(1024, 0) & documents(2x3, 5)"),
        (PrefixLM(7), "prefix(7)"),
        (First(4, (0, 2, 100)), "first(6, 4@100)"),
        (First((4, 1), (9, 0)), "first(1, 4@9)"),
        (First(0), "first(0)"),
        (~(Causal() | Window(2)) & ~First(1), "~first(1) & ~(causal | window(2))"),
        (Documents.from_cu_seqlens(np.array([0, 3, 3, 8], np.int32)), "documents(3, 5)"),
        (BlockSparse(np.eye(3, dtype=bool), 64, 32), "blocks(64, 32, 3x3, AAEDAQMB)"),
    ],
)
def test_names(mask, name):
    assert mask.name == name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("casual", "unknown mask 'casual'; known: full, causal, window"),
        ("", "a mask is missing at the end"),
        ("causal &", "a mask is missing at the end"),
        ("& causal", "a mask is missing before '&'"),
        ("causal causal", "'causal' is not expected there"),
        ("causal)", r"'\)' is not expected there"),
        ("(causal", r"a \) is missing"),
        ("window(4K", "cannot read on from '4K'"),
        ("window(1, 2, 3)", r"'window\(1, 2, 3\)' is not of the form window\(left, right\)"),
        ("window(1, left=2)", "not of the form"),
        ("window(-1)", "'-1' is no count of tokens"),
        ("causal(3)", r"'causal\(3\)' is not of the form causal"),
        ("first()", r"'first\(\)' is not of the form first\(count"),
        ("documents(3y5)", "'3y5' is no count of tokens"),
        ("documents(1Gx1)", "more than 1048576 documents"),
        ("documents(2048x1G)", "documents hold 2199023255552 tokens; at most"),
        ("prefix(9999999999999999)", "prefix is 9999999999999999; it must be a whole number from 0 to"),
        ("blocks(4, 4, 2x2, !)", "cannot read|the packed map"),
        ("blocks(4, 4, 2x2, A)", "the packed map is not that of 2 x 2 blocks"),
        ("blocks(4, 4, 2x2, gICAgICAgIA)", "the packed map is not that of 2 x 2 blocks"),
        ("blocks(4, 4, 2x2, zzzz)", "the packed map is not that of 2 x 2 blocks"),
        ("blocks(4, 4, 2x2)", "not of the form blocks"),
        ("blocks(0, 4, 3x3, AAEDAQMB)", "q_block is 0"),
        ("blocks(64, 32, 90x3, AAEDAQMB)", "the packed map is not that of 90 x 3 blocks"),
        ("blocks(4, 4, 1Mx1M, AAEDAQMB)", "not that of"),
        ("~" * 101 + "causal", "more than 100 levels"),
        ("(" * 5000 + "causal", "more than 100 levels"),
        ("causal ! full", "cannot read on from '! full'"),
    ],
)
def test_bad_texts_are_refused_with_what_is_allowed(text, said):
    with pytest.raises(WorkloadError, match=said) as caught:
        mask_named(text)
    message = str(caught.value)
    assert "documents(length, NxLENGTH, ...)" in message
    assert len(message) < 450
    assert shortened(text) in message or f"unknown mask {text!r}" in message


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Window(-1, -1), "left of a window is -1; it must be 0 or more, or None for no bound"),
        (lambda: Window(2.5), "left of a window is 2.5; it must be a whole number"),
        (lambda: Documents([3, -1]), "lengths of documents hold -1"),
        (lambda: Documents([3.5]), r"lengths of documents are float64\(1,\)"),
        (lambda: Documents([[3], [5]]), r"lengths of documents are int64\(2, 1\)"),
        (lambda: Documents(7), r"lengths of documents are int64\(\)"),
        (lambda: First(3, (-2,)), "starts hold -2"),
        (lambda: First((3, 4), (0,)), "2 counts of first keys for 1 starts"),
        (lambda: First(True), "count of first keys is True"),
        (lambda: BlockSparse(np.ones(4, bool), 2, 2), r"blocks are bool\(4,\); give a 2-D array of bool"),
        (lambda: BlockSparse(np.ones((2, 2)), 2, 2), r"blocks are float64\(2, 2\)"),
        (lambda: Documents.from_cu_seqlens([]), "cu_seqlens are empty; the first must be 0"),
        (lambda: Documents.from_cu_seqlens([1, 4]), "cu_seqlens begin with 1; the first must be 0"),
        (lambda: Documents.from_cu_seqlens([0, 4, 3]), r"cu_seqlens fall from 4 to 3 \(at index 2\)"),
        (lambda: Documents.from_cu_seqlens([0, 2**41]), "cu_seqlens hold 2199023255552"),
        (lambda: Documents.from_cu_seqlens(None), "cu_seqlens are"),
        (lambda: both(Causal(), object()), "does not compose"),
        (lambda: mask_named(Causal()), "a mask as text is wanted"),
    ],
)
def test_masks_that_cannot_exist_are_refused(make, said):
    with pytest.raises(WorkloadError, match=said):
        make()


def test_only_masks_compose():
    for operate in (lambda: Causal() & 3, lambda: Causal() | "full"):
        with pytest.raises(TypeError):
            operate()
    assert Causal() != "causal"


def test_positions_within_documents():
    documents = Documents((3, 2, 4))
    assert documents.within(np.arange(11)).tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0, 1]
    held = Partition(kind="striped", length=9, world_size=2).positions(1)
    assert documents.within(held).tolist() == [1, 0, 0, 2]
    assert documents.within(8) == 3


@pytest.mark.parametrize(
    ("mask", "extent"),
    [
        (Causal(), None),
        (Window(9), None),
        (First(9), None),
        (First(4, (0, 30)), 31),
        (Documents((5, 7)), 12),
        (BlockSparse(np.ones((3, 2), bool), 4, 8), 9),
        (~Documents((5, 7)) | Causal(), 12),
        (Documents((5, 7)) & First(1, (50,)), 51),
    ],
)
def test_a_mask_knows_the_sequence_that_it_describes(mask, extent):
    assert mask.extent == extent
    if extent is not None:
        assert Workload(q_len=extent, mask=mask).mask is mask
        assert Workload(q_len=1, q_offset=extent - 1, kv_len=1, mask=mask).mask is mask
        with pytest.raises(WorkloadError, match=f"describes {extent} tokens, the sequence has {extent - 1}; "):
            Workload(q_len=extent - 1, mask=mask)


def test_a_mask_of_text_in_a_workload_is_refused_with_the_remedy():
    with pytest.raises(
        WorkloadError, match=r"mask is 'causal'; give a mask such as ringsim.Causal\(\) or mask_named\('causal'\)"
    ):
        Workload(q_len=4, mask="causal")


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
def test_pieces_look_only_at_what_overlaps(kind):
    """Thousands of documents and hundreds of ranks: in all, no more pieces than documents and boundaries."""
    documents = Documents([100] * 20_000)
    mask = documents & Causal()
    ranks = 64
    partition = Partition(kind=kind, length=documents.extent, world_size=ranks)
    spans = [span for rank in range(ranks) for span in partition.spans(rank)]
    pieces = sum(len(mask.pieces(q, k)) for q in spans for k in spans)
    assert pieces <= 20_000 + 3 * len(spans)


def test_a_large_map_has_a_name():
    blocks = np.random.default_rng(0).random((700, 900)) < 0.01
    blocks[300:] = True
    again = mask_named(BlockSparse(blocks, 128, 128).name)
    assert np.array_equal(again.blocks, blocks)


def test_what_is_seen_whole_is_not_masked():
    q, k = Span(row=0, count=100, start=0), Span(row=0, count=100, start=0)
    first, rest = (Causal() | First(10)).pieces(q, k)
    assert (first[1].count, first[2:]) == (10, (None, None))
    assert (rest[1].start, rest[2:]) == (10, (0, None))
    later = Span(row=0, count=50, start=100)
    assert (Causal() & Window(1000)).pieces(later, k) == ((later, k, None, None),)
