"""Programs with a fault put into them, for tests of validation."""

from dataclasses import replace

from ringsim.schedule import Compute, Wait


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
