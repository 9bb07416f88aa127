"""Programs with a fault put into them, for tests of validation."""

from dataclasses import replace

from ringsim.schedule import Compute, Wait
from ringsim.schedule.schedule import regions


def numbered(ops):
    """Ids counted anew, and waits for what is left."""
    ids, kept = {}, []
    for op in ops:
        if isinstance(op, Wait):
            posts = tuple(ids[post] for post in op.posts if post in ids)
            if not posts:
                continue
            kept.append(replace(op, id=len(kept), posts=posts))
        else:
            ids.setdefault(op.id, len(kept))
            kept.append(replace(op, id=len(kept)))
    return tuple(kept)


def with_ranks(schedule, **programs):
    """The schedule with the programs of some ranks (``rank_1=ops``) in place of its own."""
    given = [programs.get(f"rank_{rank}", tuple(schedule.program(rank))) for rank in range(schedule.world_size)]
    return replace(schedule, given=tuple(map(numbered, given)))


def edited(schedule, rank, change, where, *, which=0):
    """One op of a rank, the one of that index among those that `where` picks, in place of what `change` makes of it."""
    ops = list(schedule.program(rank))
    found = [index for index, op in enumerate(ops) if where(op)]
    index = found[which]
    ops[index : index + 1] = change(ops[index])
    return with_ranks(schedule, **{f"rank_{rank}": ops})


def kernel(name):
    return lambda op: isinstance(op, Compute) and op.kernel == name


def post(kind, phase="hop"):
    return lambda op: isinstance(op, kind) and op.phase == phase


def versions(regions, change):
    return tuple(replace(region, version=region.version + change) for region in regions)


def find(schedule, rank, where, which=0):
    return [op for op in schedule.program(rank) if where(op)][which]


def with_regions(op, change):
    """An op with `change` of each of its regions."""
    if isinstance(op, Compute):
        return replace(op, reads=tuple(map(change, op.reads)), writes=tuple(map(change, op.writes)))
    return op if isinstance(op, Wait) else replace(op, region=change(op.region))


def recounted(schedule, written, by):
    """These versions, and what comes after them, are counted anew on every rank: each read finds the version that it names."""
    first = {region.value: region.version for region in written}

    def late(found):
        return found.version >= first.get(found.value, found.version + 1)

    def change(found):
        return replace(found, version=found.version + by) if late(found) else found

    def changed(op):
        return with_regions(op, change) if any(map(late, regions(op))) else op

    programs = {f"rank_{rank}": map(changed, schedule.program(rank)) for rank in range(schedule.world_size)}
    return with_ranks(schedule, **programs)


def left_out(schedule, rank, where, which=0):
    """An op that changes sums is left out, and versions are counted anew: only what is in them is wrong."""
    lost = find(schedule, rank, where, which)
    ops = [op for op in schedule.program(rank) if op != lost]
    return recounted(with_ranks(schedule, **{f"rank_{rank}": ops}), lost.writes, -1)


def again(schedule, rank, where, which=0):
    """An op that changes sums comes a second time, and versions are counted anew."""
    values = {r.value for r in find(schedule, rank, where, which).writes}
    counted = recounted(schedule, find(schedule, rank, where, which).writes, 1)

    def twice(op):
        reads = (replace(r, version=r.version + (r.value in values)) for r in op.reads)
        return [replace(op, writes=versions(op.writes, -1)), replace(op, reads=tuple(reads))]

    return edited(counted, rank, twice, where, which=which)


def moved(schedule, rank, where, before, which=0):
    """An op comes earlier: before the first that `before` picks."""
    ops = list(schedule.program(rank))
    op = find(schedule, rank, where, which)
    ops.remove(op)
    ops.insert(next(index for index, other in enumerate(ops) if before(other)), op)
    return with_ranks(schedule, **{f"rank_{rank}": ops})
