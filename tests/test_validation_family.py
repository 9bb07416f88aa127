"""Programs of the family with one fault each: validation finds it, and says where."""

import re
from dataclasses import replace

import pytest

from ringsim.errors import ScheduleError
from ringsim.mask import Causal, mask_named
from ringsim.schedule import Recv, Schedule, Send, Wait
from ringsim.workload import Workload

from .tampering import edited, kernel, post, versions, with_ranks

WORK = Workload(q_len=12, batch=2, heads=4, kv_heads=2, head_dim=8, v_head_dim=6)


def made(strategy, world_size=3, **options):
    return Schedule(workload=options.pop("workload", WORK), world_size=world_size, strategy=strategy, **options)


def region(**changes):
    """The region of a post with such changes."""
    return lambda op: [replace(op, region=replace(op.region, **changes))]


def read(index, change):
    """A compute whose region `index` is read as what `change` makes of it."""
    return lambda op: [replace(op, reads=(*op.reads[:index], change(op.reads[index]), *op.reads[index + 1 :]))]


def wrote(index, **changes):
    return lambda op: [replace(op, writes=tuple(replace(r, **changes) if i == index else r for i, r in enumerate(op.writes)))]


def finished_later(schedule, rank, by):
    """The last version that `finish` of the first state reads is another one."""
    return edited(schedule, rank, lambda op: [replace(op, reads=versions(op.reads, by))], kernel("finish"))


def partial_merged_twice():
    again = edited(
        made("pass-q"),
        0,
        lambda op: [op, replace(op, reads=(*versions(op.reads[:3], 1), *op.reads[3:]), writes=versions(op.writes, 1))],
        kernel("merge"),
        which=-1,
    )
    return finished_later(again, 0, 1)


def first_partial_in_place_of_the_second():
    schedule = made("pass-q")
    first = next(op for op in schedule.program(0) if kernel("merge")(op))
    return edited(schedule, 0, lambda op: [replace(op, reads=(*op.reads[:3], *first.reads[3:]))], kernel("merge"), which=-1)


def partial_merged_into_itself():

    def own(op):
        return [replace(op, reads=(*op.reads[:3], *op.reads[:3]))]

    return edited(made("pass-q"), 0, own, kernel("merge"))


def partial_of_another_block_merged():
    return edited(
        made("pass-q"),
        0,
        lambda op: [replace(op, reads=(*op.reads[:3], *(replace(r, value="state[1]@1") for r in op.reads[3:])))],
        kernel("merge"),
    )


def partial_never_merged():
    return finished_later(edited(made("token-ring"), 0, lambda op: [], kernel("merge"), which=-1), 0, -1)


def another_partial_sent_home():
    schedule = made("token-ring", 4)
    other = next(op.region for op in schedule.program(1) if post(Send, "home")(op))
    return edited(schedule, 1, region(value=other.value), post(Send, "home"), which=1)


def state_sent_home_with_an_old_version():
    schedule = made("q-ring", 2)
    return edited(schedule, 1, lambda op: [replace(op, region=versions([op.region], -1)[0])], post(Send, "home"))


def state_sent_home_before_it_is_whole():
    """Both sides agree on the old version, which is what the slot holds when it is sent."""
    schedule = made("q-ring", 2)
    ops = list(schedule.program(1))
    home = next(op for op in ops if post(Send, "home")(op))
    attend = next(op for op in ops if kernel("attend")(op) and op.writes[0].slot == home.region.slot)
    early = [op for op in ops if op is not attend]
    early[early.index(home)] = replace(home, region=versions([home.region], -1)[0])
    wait = Wait(id=0, step=home.step, phase="hop", posts=(home.id,))
    place = next(i for i, op in enumerate(early) if isinstance(op, Send) and op.id == home.id) + 1
    late = [replace(op, posts=tuple(p for p in op.posts if p != home.id)) if isinstance(op, Wait) else op for op in early[place:]]
    found = with_ranks(schedule, rank_1=[*early[:place], wait, attend, *late])

    def back(op):
        return [replace(op, region=versions([op.region], -1)[0])]

    return finished_later(edited(found, 0, back, post(Recv, "home")), 0, -1)


def home_hop_left_out(by=0):
    schedule = edited(made("q-ring", 2), 1, lambda op: [], post(Send, "home"))
    schedule = edited(schedule, 0, lambda op: [], post(Recv, "home"))
    return finished_later(schedule, 0, by) if by else schedule


def half_computed_twice():
    schedule = edited(
        made("bidirectional"),
        1,
        lambda op: [op, replace(op, reads=(*op.reads[:3], *versions(op.reads[3:], 1)), writes=versions(op.writes, 1))],
        kernel("attend"),
        which=-1,
    )
    return finished_later(schedule, 1, 1)


def heads_shifted_in_a_pack():
    schedule = made("multi-ring(2)")
    packs = [op for op in schedule.program(0) if kernel("pack")(op)]
    return edited(schedule, 0, lambda op: [replace(op, reads=packs[-2].reads)], kernel("pack"))


def heads_shifted_in_an_attend():
    schedule = made("multi-ring(2)")
    other = [op for op in schedule.program(0) if kernel("attend")(op)][1]
    return edited(schedule, 0, lambda op: [replace(op, reads=(op.reads[0], *other.reads[1:3], *op.reads[3:]))], kernel("attend"))


def box_of_other_rows():

    def shifted(found):
        return replace(found, box=((0, 2), (1, 3), *found.box[2:]))

    return edited(made("bidirectional"), 0, read(1, shifted), kernel("attend"))


def k_and_v_of_different_halves():
    schedule = made("bidirectional")
    other = [op for op in schedule.program(0) if kernel("attend")(op)][1]
    return edited(schedule, 0, read(2, lambda _: other.reads[2]), kernel("attend"))


def region_that_is_not_dense():
    schedule = made("bidirectional")
    source = next(op.reads[0] for op in schedule.program(0) if kernel("pack")(op))
    return edited(schedule, 0, lambda op: [replace(op, region=source)], post(Send))


def message_too_long():
    return replace(with_ranks(made("ring")), max_message_nbytes=100)


def receive_over_an_input():
    schedule = made("ring")
    return edited(schedule, 0, region(slot=0), post(Recv))


def pack_over_an_input():
    return edited(made("bidirectional"), 0, wrote(0, slot=0), kernel("pack"))


def heads_and_rows_exchanged():
    return edited(made("ring"), 0, read(1, lambda r: replace(r, shape=(2, 2, 4, 8))), kernel("attend"), which=1)


def numbers_of_another_dtype():
    schedule = made("ring", workload=replace(WORK, dtype="float16", wire_dtype="float16"))
    return edited(schedule, 0, read(1, lambda r: replace(r, dtype="bfloat16")), kernel("attend"), which=1)


def maximum_and_sum_exchanged():

    def swap(op):
        return [replace(op, reads=(op.reads[0], op.reads[2], op.reads[1]))]

    return edited(made("q-ring"), 0, swap, kernel("finish"))


def state_begun_anew():
    """The second block is folded into a fresh state, and the first is lost."""
    schedule = made("ring", 2)
    reset = next(op for op in schedule.program(0) if kernel("reset")(op))

    def anew(op):
        late = replace(op, reads=(*op.reads[:3], *versions(op.reads[3:], -1)), writes=versions(op.writes, -1))
        return [replace(reset, step=1), late]

    return finished_later(edited(schedule, 0, anew, kernel("attend"), which=1), 0, -1)


def state_that_is_old():

    def old(op):
        return [replace(op, reads=(*op.reads[:3], *versions(op.reads[3:], -1)), writes=versions(op.writes, -1))]

    return edited(made("ring"), 0, old, kernel("attend"), which=1)


def folded_into_the_other_half():
    schedule = made("q-ring")
    first = next(op for op in schedule.program(0) if kernel("attend")(op))

    def swap(op):
        return [replace(op, reads=(*first.reads[:3], *op.reads[3:]))]

    return edited(schedule, 0, swap, kernel("attend"), which=1)


def result_of_a_slice_left_out(mask="full"):
    schedule = made("multi-ring(2)", workload=replace(WORK, mask=mask_named(mask)))
    return edited(schedule, 2, lambda op: [], kernel("finish"))


def result_made_twice():
    return edited(made("multi-ring(2)"), 2, lambda op: [op, op], kernel("finish"))


def result_of_another_rank():
    schedule = made("pass-q")
    other = next(op for op in schedule.program(1) if kernel("finish")(op))
    return edited(schedule, 0, lambda op: [replace(other)], kernel("finish"))


def tile_of_more_heads_than_the_slice():

    def wider(op):
        return [replace(op, tiles=tuple(replace(tile, heads=(0, 4)) for tile in op.tiles))]

    schedule = edited(made("multi-ring(2)"), 0, wider, kernel("attend"))
    return edited(schedule, 0, lambda op: [replace(op, tiles=())], kernel("attend"), which=1)


def second_op_of_a_pair_with_other_rows():
    """A block attended in two ops of which the second is wrong."""
    schedule = made("ring", 2, workload=Workload(q_len=8, mask=Causal()), partition="zigzag")
    op = [op for op in schedule.program(0) if kernel("attend")(op)][-1]
    tile = op.tiles[0]
    parts = [replace(tile, k=tile.k.part(0, 1)), replace(tile, k=replace(tile.k.part(1, 2), row=0))]

    def two(op):
        second = replace(op, tiles=(parts[1],), reads=(*op.reads[:3], *versions(op.reads[3:], 1)), writes=versions(op.writes, 1))
        return [replace(op, tiles=(parts[0], *op.tiles[1:])), second]

    return finished_later(edited(schedule, 0, two, kernel("attend"), which=-1), 0, 1)


def turn_skipped_in_the_inner_ring():
    schedule = made("double-ring(2)", 4)
    return edited(schedule, 0, lambda op: [], kernel("attend"), which=1)


def node_hop_of_the_wrong_block():
    schedule = made("double-ring(2)", 4)
    own = next(op for op in schedule.program(1) if post(Send, "cross")(op))
    return edited(schedule, 0, lambda op: [replace(op, region=own.region)], post(Send, "cross"))


def value(text):
    return edited(made("ring"), 0, read(1, lambda r: replace(r, value=text)), kernel("attend"))


FAULTS = {
    "a partial merged twice": (partial_merged_twice, r"rank 0, op \d+ .*merges state\[0\]@2, part of which is in"),
    "the first partial in place of the second": (first_partial_in_place_of_the_second, r"merges state\[0\]@1, part of which"),
    "a partial merged into itself": (partial_merged_into_itself, r"merges state\[0\] version 1 .*into state\[0\]"),
    "a partial of another block merged": (partial_of_another_block_merged, r"merges state\[1\]@1 .*into state\[0\]"),
    "a partial never merged": (partial_never_merged, r"rank 0: the output of q\[0\] lacks what op \d+ of rank 2 attends"),
    "another partial sent home": (another_partial_sent_home, r"which holds|the matching send carries"),
    "an old version sent home": (state_sent_home_with_an_old_version, r"rank 1, op \d+ \(send.*which holds state\[0"),
    "a state sent home early": (state_sent_home_before_it_is_whole, r"rank 0: the output of q\[0\|.* lacks what op .* of rank 1"),
    "a home hop left out": (home_hop_left_out, r"rank 0, op .*reads state\[0.* version 2 .*holds state\[0.* version 1"),
    "a home hop that nothing misses": (lambda: home_hop_left_out(-1), r"rank 0: the output of q\[0.* lacks what op .* of rank 1"),
    "a half computed twice": (half_computed_twice, r"covered 2 times and required 1 times"),
    "heads shifted in a pack": (heads_shifted_in_a_pack, r"gives pack k\[0\|0:4\|0:1\] .*in place of k\[0\|0:4\|1:2\]"),
    "heads shifted in an attend": (heads_shifted_in_an_attend, r"puts q\[0\|0:4\|0:1\], k\[0\|0:4\|1:2\] and v.* together"),
    "a box of other rows": (box_of_other_rows, r"gives attend k\[0\|0:2\|0:2\]"),
    "k and v of different halves": (k_and_v_of_different_halves, r"puts q\[0\], k\[0\|0:2\|0:2\] and v\[0\|2:4\|0:2\] together"),
    "a region that is not dense": (region_that_is_not_dense, r"moves k\[0\|0:2\|0:2\], which is not dense"),
    "a message that is too long": (message_too_long, r"moves 512 B at once; at most 100 are allowed"),
    "a receive over an input": (receive_over_an_input, "writes over the caller's k"),
    "a pack over an input": (pack_over_an_input, "writes over the caller's k"),
    "heads and rows exchanged": (heads_and_rows_exchanged, r"gives attend k\[2\] .*2,2,4,8.* in place of .*2,4,2,8"),
    "numbers of another dtype": (numbers_of_another_dtype, r"gives attend k\[2\] .*bfloat16.* in place of .*float16"),
    "maximum and sum exchanged": (maximum_and_sum_exchanged, "gives finish state"),
    "a state begun anew": (state_begun_anew, r"makes acc\[0\] version 1, which is made elsewhere of other blocks"),
    "an old state": (state_that_is_old, r"reads acc\[0\] version 0 .*which holds acc\[0\] version 1"),
    "folded into the other half": (folded_into_the_other_half, r"folds q\[0\|\S+, k\[0\S+, v\[0\S+ into state\[0\|"),
    "a result left out": (result_of_a_slice_left_out, r"rank 2: the output of q\[2\|0:4\|0:1\] lacks"),
    "an empty result left out": (lambda: result_of_a_slice_left_out("~full"), "rank 2: some rows and heads .*or never"),
    "a result made twice": (result_made_twice, r"rank 2, op .*makes the output of acc\[2\|0:4\|0:1\] a second time"),
    "the result of another rank": (result_of_another_rank, "rank 0, op .*makes the output of rank 1"),
    "a tile of too many heads": (tile_of_more_heads_than_the_slice, r"a tile of heads \(0, 4\) .*beyond"),
    "a second op with other rows": (second_op_of_a_pair_with_other_rows, "a tile's k rows from 0 do not hold"),
    "an attend left out": (turn_skipped_in_the_inner_ring, r"reads acc\[0\] version 2 .*which holds acc\[0\] version 1"),
    "the wrong block across nodes": (node_hop_of_the_wrong_block, r"rank 0, op .*\(send.*reads k\[1\].*the rank's own"),
    "a rank that is none": (lambda: value("k[7]"), r"'k\[7\]' names a block of rank 7; there are 3"),
    "rows that are none": (lambda: value("k[0|2:9|0:2]"), "names no block of rank 0, which has 4 rows"),
    "no block": (lambda: value("k"), "'k' names no block"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_validation_finds(name):
    broken, message = FAULTS[name]
    with pytest.raises(ScheduleError, match=message) as caught:
        broken().validate()
    assert re.search(r"(?m)^step +rank 0 +rank 1", str(caught.value)), "shows the grid"


@pytest.mark.parametrize(
    "strategy", ["ring", "bidirectional", "q-ring", "pass-q", "token-ring", "multi-ring(2)", "double-ring(3)"]
)
def test_programs_that_nothing_was_done_to_are_valid(strategy):
    with_ranks(made(strategy)).validate()


def test_a_fault_written_into_the_text_is_found():
    text = made("pass-q").to_text()
    head, rest = re.split(r"(?m)^(?=rank 1$)", text, maxsplit=1)
    merges = [line for line in head.splitlines() if "kernel=merge" in line]
    first, second = (re.search(r"state@\d\[[^;]*\]=(state\[0\]@\d)", line)[1] for line in merges)
    assert (first, second) == ("state[0]@1", "state[0]@2")
    broken = head.replace(merges[1], merges[1].replace(second, first)).replace(f"digest {made('pass-q').digest}\n", "")
    with pytest.raises(ScheduleError, match=r"which holds state\[0\]@2 version 1"):
        Schedule.from_text(broken + rest).validate()
