"""Backward programs with one fault each: validation finds it, and says where."""

import re
from dataclasses import replace

import pytest

from ringsim.errors import ScheduleError
from ringsim.mask import Causal, mask_named
from ringsim.schedule import Recv, Schedule, Send, Wait
from ringsim.workload import Workload

from .tampering import again, edited, find, kernel, left_out, moved, post, recounted, versions, with_ranks, with_regions
from .test_validation_family import read, region, wrote

WORK = Workload(q_len=12, batch=2, heads=4, kv_heads=2, head_dim=8, v_head_dim=6, pass_="backward")
ATTEND, ADD, CAST = kernel("attend_backward"), kernel("accumulate"), kernel("cast")


def made(strategy="ring", world_size=3, **options):
    work = replace(options.pop("workload", WORK), pass_=options.pop("pass_", "backward"))
    return Schedule(workload=work, world_size=world_size, strategy=strategy, **options)


def casts(name):
    return lambda op: CAST(op) and op.writes[0].buffer == name


def nothing(op):
    return []


def at_home(op):
    """Adds what came home."""
    return ADD(op) and "@" in op.reads[0].value


def on_the_road(op):
    return ADD(op) and "@" not in op.reads[0].value


def home_left_out():
    """Nothing is sent home, nothing expected, nothing added there."""
    schedule = left_out(made(), 0, at_home)
    for _ in range(2):
        schedule = edited(schedule, 0, nothing, post(Recv, "home"))
        schedule = edited(schedule, 2, nothing, lambda op: post(Send, "home")(op) and op.peer == 0)
    return schedule


def sum_of_another_rank_added():
    schedule = made()
    other = find(schedule, 0, on_the_road).reads[2:]
    return edited(schedule, 0, lambda op: [replace(op, reads=(*op.reads[:2], *other))], at_home)


def added_to_itself():
    return edited(made(), 0, lambda op: [replace(op, reads=(*op.reads[:2], *op.reads[:2]))], on_the_road)


def tiles_of(which):
    """An attend_backward over the tiles of another."""
    schedule = made(workload=replace(WORK, mask=Causal()))
    other = find(schedule, 2, ATTEND, which).tiles
    return edited(schedule, 2, lambda op: [replace(op, tiles=other)], ATTEND)


def input_of_the_own_block(index, name):
    """On the road, in place of what came, what is at home."""
    schedule = made("burst")
    own = find(schedule, 0, ATTEND).reads[index]
    assert own.buffer == name
    return edited(schedule, 0, read(index, lambda _: own), ATTEND, which=1)


def sent_too_early():
    """The sum goes home before this rank's part is in it; both sides agree on what is there by then."""
    schedule = made("ring", 2)
    ops = list(schedule.program(1))
    late = find(schedule, 1, ATTEND, 1)
    sends = [replace(op, region=versions([op.region], -1)[0]) for op in ops if post(Send, "home")(op)]
    ids = {op.id for op in sends}
    wait = Wait(id=len(ops), step=1, phase="home", posts=tuple(ids))
    kept = [op for op in ops if op.id not in ids]
    kept = [replace(op, posts=tuple(p for p in op.posts if p not in ids)) if isinstance(op, Wait) else op for op in kept]
    place = kept.index(late)
    found = with_ranks(schedule, rank_1=[*kept[:place], *sends, wait, *kept[place:]])
    for which in range(2):
        found = edited(found, 0, lambda op: [replace(op, region=versions([op.region], -1)[0])], post(Recv, "home"), which=which)
    return edited(found, 0, lambda op: [replace(op, reads=(*op.reads[:2], *versions(op.reads[2:], -1)))], at_home)


def cast_too_early():
    """Before what came home is added: the cast names the version that there is by then."""
    schedule = edited(made(), 0, lambda op: [replace(op, reads=versions(op.reads, -1))], casts("dk"))
    return moved(schedule, 0, casts("dk"), at_home)


def without_wait(where, which=0):
    """The wait right before an op is taken out; the one at the end of the program waits for its posts."""
    schedule = made()
    ops = list(schedule.program(0))
    index = ops.index(find(schedule, 0, where, which))
    assert isinstance(ops[index - 1], Wait)
    last = replace(ops[-1], posts=ops[-1].posts + ops[index - 1].posts)
    return with_ranks(schedule, rank_0=[*ops[: index - 1], *ops[index:-1], last])


def sum_begun_anew():
    """The part of the second block is added to zeros, what was there before is lost."""
    schedule = made()
    clear = next(op for op in schedule.program(0) if kernel("clear")(op) and op.writes[0].buffer == "dq_sum")
    anew = edited(schedule, 0, lambda op: [replace(clear, step=1), op], ATTEND, which=1)

    def from_the_start(found):
        late = found.value == "dq_sum[0]" and found.version > 0
        return replace(found, version=found.version - 1) if late else found

    ops = list(anew.program(0))
    place = [index for index, op in enumerate(ops) if ATTEND(op)][1]
    return with_ranks(anew, rank_0=[*ops[:place], *(with_regions(op, from_the_start) for op in ops[place:])])


def exchanged(op):
    return [replace(op, reads=op.reads[::-1])]


def dv_never_added():
    """Of what comes home dk is added, dv is not; each is then cast in its newest version."""

    def only_dk(op):
        return [replace(op, reads=op.reads[::2], writes=op.writes[:1])]

    def one_by_one(op):
        old = versions(op.reads[1:], -1)
        return [replace(op, reads=op.reads[:1], writes=op.writes[:1]), replace(op, reads=old, writes=op.writes[1:])]

    return edited(edited(made(), 0, only_dk, at_home), 0, one_by_one, casts("dk"))


def half_as_precise():
    """Sums travel in bfloat16; both sides agree."""
    schedule = made()
    for rank in range(3):
        for where in (post(Send, "sums"), post(Recv, "sums")):
            for which in range(2):
                schedule = edited(schedule, rank, region(dtype="bfloat16"), where, which=which)
    return schedule


def cast_of_another_rank():
    other = find(made(), 1, casts("dq"))
    return edited(made(), 0, lambda op: [other], casts("dq"))


def slice_never_cast(mask="full"):
    return edited(made("multi-ring(2)", workload=replace(WORK, mask=mask_named(mask))), 2, nothing, casts("dk"))


def node_added_twice():
    """What a node adds to a block is added to what goes across, and again a second time."""
    return again(made("double-ring(2)", 4), 0, lambda op: on_the_road(op) and "@" in op.reads[2].value)


def rows_of_others():
    schedule = made("halo", workload=replace(WORK, mask=mask_named("window(2, 0)")))

    def shifted(found):
        (low, high), *others = found.box
        return replace(found, box=((low - 1, high - 1), *others))

    return edited(schedule, 0, read(2, shifted), at_home)


def before_the_output(name, index):
    """In one program with the forward pass: what is made of the output, before there is one."""
    schedule = made(pass_="both")
    return moved(schedule, 0, kernel(name), kernel("finish"), which=index)


def node_left_out():
    return left_out(made("double-ring(2)", 4), 0, lambda op: on_the_road(op) and "@" in op.reads[2].value)


FAULTS = {
    "a sum added twice at home": (lambda: again(made(), 0, at_home), r"rank 0, op \d+ .*merges dk_sum\[0\], part of which is in"),
    "a sum added twice on the road": (
        lambda: again(made(), 0, on_the_road),
        r"rank 0, op \d+ .*merges dk_sum\[1\]@0, part of which is in dk_sum\[1\]",
    ),
    "a sum dropped at home": (
        lambda: left_out(made(), 0, at_home),
        r"rank 0: dk\[0\] lacks what op \d+ of rank 1 attends, and 1",
    ),
    "a sum dropped on the road": (
        lambda: left_out(made(), 0, on_the_road),
        r"rank 1: dk\[1\] lacks what op \d+ of rank 0 attends, and 0 more",
    ),
    "a sum dropped, versions as they were": (
        lambda: edited(made(), 0, nothing, on_the_road),
        r"rank 0, op \d+ \(send.*reads dk_sum\[1\] version 2 .*which holds dk_sum\[1\] version 1",
    ),
    "a home hop left out": (home_left_out, r"rank 0: dk\[0\] lacks what op \d+ of rank 1 attends, and 1 more"),
    "a sum of another rank added": (
        sum_of_another_rank_added,
        r"rank 0, op \d+ .*adds dk_sum\[1\]@0 version 1 .*to dk_sum\[0\]@0",
    ),
    "a sum added to itself": (added_to_itself, r"rank 0, op \d+ .*adds dk_sum\[1\] version 1 .*to dk_sum\[1\] version 1"),
    "an attend_backward left out": (lambda: left_out(made(), 1, ATTEND, 1), r"covered 0 times and required 1 times"),
    "an attend_backward left out, versions as they were": (
        lambda: edited(made(), 1, nothing, ATTEND, which=1),
        r"rank 1, op \d+ \(send.*reads dk_sum\[0\] version 1 .*which holds dk_sum\[0\] version 0",
    ),
    "an attend_backward twice": (lambda: again(made(), 1, ATTEND, 1), r"covered 2 times and required 1 times"),
    "no tiles": (lambda: edited(made(), 0, lambda op: [replace(op, tiles=())], ATTEND), r"covered 0 times and required 1"),
    "tiles of another block": (lambda: tiles_of(1), r"rank 2, op \d+ .*a tile's k rows from 0 do not hold positions"),
    "delta of another block": (
        lambda: input_of_the_own_block(5, "delta"),
        r"rank 0, op \d+ .*adds to dq_sum\[2\] .*from q\[2\], .*, delta\[0\]",
    ),
    "lse of another rank": (
        lambda: input_of_the_own_block(4, "lse"),
        r"rank 0, op \d+ .*adds to dq_sum\[2\] .*from .*, lse\[0\], ",
    ),
    "dout of another rank": (lambda: input_of_the_own_block(3, "dout"), r"rank 0, op \d+ .*from .*, dout\[0\], "),
    "queries of another rank": (
        lambda: input_of_the_own_block(0, "q"),
        r"rank 0, op \d+ .*from q\[0\], k\[0\], v\[0\], dout\[2\]",
    ),
    "lse and delta exchanged": (
        lambda: edited(
            made(), 0, lambda op: [replace(op, reads=(*op.reads[:4], op.reads[5], op.reads[4], *op.reads[6:]))], ATTEND
        ),
        r"rank 0, op \d+ .*adds to dq_sum\[0\] .*from .*dout\[0\], delta\[0\], lse\[0\]",
    ),
    "only queries": (
        lambda: edited(made(), 0, lambda op: [replace(op, reads=op.reads[:1])], ATTEND),
        r"rank 0, op \d+ .*lacks a sum",
    ),
    "no sum of dv": (
        lambda: edited(made(), 0, lambda op: [replace(op, reads=op.reads[:8], writes=op.writes[:2])], ATTEND),
        r"rank 0, op \d+ .*adds to dq_sum\[0\] version 0 .*and dk_sum\[0\]@0 version 0",
    ),
    "zeros of something": (
        lambda: edited(made(), 0, lambda op: [replace(op, reads=op.writes)], kernel("clear")),
        r"rank 0, op \d+ .*gives clear dq_sum\[0\] version 0 .*in place of nothing",
    ),
    "half of delta never made": (
        lambda: edited(made("q-ring"), 0, nothing, kernel("delta"), which=1),
        r"rank 0, op \d+ .*reads delta\[0\|0:4\|1:2\] version 0 from delta slot 0, which holds something else",
    ),
    "tiles twice": (lambda: edited(made(), 0, lambda op: [replace(op, tiles=op.tiles * 2)], ATTEND), r"covered 2 times"),
    "a kernel that is not known": (
        lambda: edited(made(), 0, lambda op: [replace(op, kernel="add")], at_home),
        r"rank 0: dk\[0\] lacks what op \d+ of rank 0 attends",
    ),
    "dq of another half": (
        lambda: edited(made("q-ring"), 0, read(6, lambda _: find(made("q-ring"), 0, ATTEND, 1).reads[6]), ATTEND),
        r"rank 0, op \d+ .*adds to dq_sum\[0\|0:4\|1:2\]@0",
    ),
    "k and v of different halves": (
        lambda: edited(made("bidirectional"), 0, read(2, lambda _: find(made("bidirectional"), 0, ATTEND, 1).reads[2]), ATTEND),
        r"rank 0, op \d+ .*from q\[0\], k\[0\|0:2\|0:2\], v\[0\|2:4\|0:2\]",
    ),
    "a sum sent before it is whole": (sent_too_early, r"rank 0: dk\[0\] lacks what op \d+ of rank 1 attends"),
    "a send before the attend, versions as they were": (
        lambda: moved(made(), 0, post(Send, "sums"), lambda op: ATTEND(op) and op.step == 1),
        r"rank 0, op \d+ .*touches a region of post|rank 0, op \d+ \(send.*holds dk_sum\[2\] version 0",
    ),
    "cast before what comes home is added": (cast_too_early, r"rank 0: dk\[0\] lacks what op \d+ of rank 1 attends"),
    "cast of an old version": (
        lambda: edited(made(), 0, lambda op: [replace(op, reads=versions(op.reads, -1))], casts("dq")),
        r"rank 0, op \d+ .*reads dq_sum\[0\] version 2 .*which holds dq_sum\[0\] version 3",
    ),
    "an old version added to": (
        lambda: edited(made(), 0, read(6, lambda r: replace(r, version=0)), ATTEND, which=2),
        r"rank 0, op \d+ .*gives attend_backward dq_sum\[0\] version 3 .*in place of dq_sum\[0\] version 1",
    ),
    "an old version, read and written": (
        lambda: edited(
            edited(made(), 0, read(6, lambda r: replace(r, version=0)), ATTEND, which=2), 0, wrote(0, version=1), ATTEND, which=2
        ),
        r"rank 0, op \d+ .*reads dq_sum\[0\] version 0 .*which holds dq_sum\[0\] version 2",
    ),
    "an old version sent home": (
        lambda: edited(made(), 0, lambda op: [replace(op, region=versions([op.region], -1)[0])], post(Send, "home")),
        r"rank 0, op \d+ \(send.*reads dk_sum\[1\] version 1 .*which holds dk_sum\[1\] version 2",
    ),
    "no wait for the sum that comes": (
        lambda: without_wait(on_the_road),
        r"rank 0, op \d+ .*touches a region of post\(s\) \[18, 19\] without waiting",
    ),
    "no wait for the sum that comes home": (lambda: without_wait(at_home), r"rank 0, op \d+ .*touches a region of post\(s\)"),
    "no wait for keys": (lambda: without_wait(ATTEND, 2), r"rank 0, op \d+ .*touches a region of post\(s\)"),
    "a sum begun anew": (sum_begun_anew, r"rank 0, op \d+ .*makes dq_sum\[0\] version 1, which is made elsewhere"),
    "a sum not cleared": (
        lambda: edited(made(), 0, nothing, kernel("clear")),
        r"rank 0, op \d+ .*reads dq_sum\[0\] version 0 .*holds nothing",
    ),
    "a gradient cast twice": (
        lambda: edited(made(), 0, lambda op: [op, op], casts("dq")),
        r"rank 0, op \d+ .*makes the output of dq_sum\[0\] a second time",
    ),
    "a gradient never cast": (lambda: edited(made(), 2, nothing, casts("dq")), r"rank 2: dq\[2\] lacks what op \d+ of rank 2"),
    "a slice never cast": (slice_never_cast, r"rank 2: dk\[2\|0:4\|0:1\] lacks what op \d+ of rank"),
    "an empty slice never cast": (
        lambda: slice_never_cast("~full"),
        r"rank 2: some rows and heads of its dk are made twice, or never",
    ),
    "the gradient of another rank": (cast_of_another_rank, r"rank 0, op \d+ .*makes the output of rank 1"),
    "dk and dv exchanged": (
        lambda: edited(made(), 0, exchanged, casts("dk")),
        r"rank 0, op \d+ .*gives cast dk\[0\] .*in place of dv\[0\]",
    ),
    "dv never added": (dv_never_added, r"rank 0: dv\[0\] lacks what op \d+ of rank 1 attends"),
    "a state cast": (
        lambda: edited(
            made(pass_="both"),
            0,
            lambda op: [replace(op, reads=find(made(pass_="both"), 0, kernel("finish")).reads)],
            casts("dq"),
        ),
        r"rank 0, op \d+ .*takes acc, max, sum for sums of gradients",
    ),
    "dout overwritten": (
        lambda: edited(made("burst"), 0, region(slot=0), lambda op: post(Recv)(op) and op.region.buffer == "dout"),
        r"rank 0, op \d+ \(recv.*writes over the caller's dout",
    ),
    "lse overwritten": (
        lambda: edited(made("burst"), 0, region(slot=0), lambda op: post(Recv)(op) and op.region.buffer == "lse"),
        r"rank 0, op \d+ \(recv.*writes over the caller's lse",
    ),
    "delta overwritten": (
        lambda: edited(made("burst"), 0, region(slot=0), lambda op: post(Recv)(op) and op.region.buffer == "delta"),
        r"rank 0, op \d+ .*(reads delta\[0\] version 0 .*which holds delta\[2\]|touches a region of post)",
    ),
    "a sum overwritten": (
        lambda: edited(made(), 0, region(slot=0), post(Recv, "sums")),
        r"rank 0, op \d+ .*reads dk_sum\[1\] version 1 from dk_sum slot 1, which holds nothing",
    ),
    "delta never made": (
        lambda: edited(made(), 0, nothing, kernel("delta")),
        r"rank 0, op \d+ .*reads delta\[0\] version 0 from delta slot 0, which holds nothing",
    ),
    "delta made of another's output": (
        lambda: edited(made(), 0, lambda op: [find(made(), 1, kernel("delta"))], kernel("delta")),
        r"rank 0, op \d+ .*makes the output of rank 1",
    ),
    "delta before the output": (
        lambda: before_the_output("delta", 0),
        r"rank 0, op \d+ .*reads out\[0\] version 0 from out slot 0, which holds nothing",
    ),
    "an output that is never made, in both passes": (
        lambda: edited(made(pass_="both"), 1, nothing, kernel("finish")),
        r"rank 1, op \d+ .*reads out\[1\] version 0 from out slot 0, which holds nothing",
    ),
    "sums in half of the precision": (
        half_as_precise,
        r"rank \d, op \d+ .*reads dk_sum\[\d\] version 1 .*which holds nothing from byte",
    ),
    "what a node adds, twice": (
        node_added_twice,
        r"rank 0, op \d+ .*merges dk_sum\[2\]@0, part of which is in dk_sum\[2\] already",
    ),
    "what a node adds, never": (node_left_out, r"rank 2: dk\[2\] lacks what op \d+ of rank 0 attends, and 1 more"),
    "rows of others": (rows_of_others, r"rank 0, op \d+ .*gives accumulate dk_sum\[0\|2:4\|0:2\]@1 .*in place of"),
    "a sum sent to another rank": (
        lambda: edited(made(world_size=4), 0, lambda op: [replace(op, peer=2)], post(Send, "sums")),
        r"rank \d, op \d+ \(.*(waits for ever|carries)",
    ),
    "a sum sent to none": (
        lambda: edited(made(), 0, lambda op: [replace(op, peer=3)], post(Send, "home")),
        r"rank 0, op \d+ \(send.*names rank 3 as its peer; there are 3",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_validation_finds(name):
    broken, message = FAULTS[name]
    with pytest.raises(ScheduleError, match=message) as caught:
        broken().validate()
    assert re.search(r"(?m)^step +rank 0 +rank 1", str(caught.value)), "shows the grid"


@pytest.mark.parametrize("pass_", ["backward", "both"])
@pytest.mark.parametrize(
    "strategy", ["ring", "burst", "bidirectional", "q-ring", "pass-q", "token-ring", "multi-ring(2)", "double-ring(3)", "halo"]
)
def test_programs_that_nothing_was_done_to_are_valid(strategy, pass_):
    schedule = made(strategy, pass_=pass_)
    with_ranks(schedule).validate()
    recounted(schedule, find(schedule, 0, ATTEND).writes, 0).validate()
