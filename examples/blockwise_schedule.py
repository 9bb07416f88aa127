"""The blockwise layer as a schedule: how much of the ring's communication hides, forward and backward, on a machine of GPUs.

python examples/blockwise_schedule.py

The strategy below is `ring` with the feed-forward of examples/blockwise_layer.py around it, one op per block of tokens. Backward,
the feed-forward comes first, and neither K nor V waits for it: their first hop is posted before it and hides behind it.
"""

import ringsim
from ringsim.schedule import Lane, Region, any_rank, strategy
from ringsim.schedule.backward import rotate_back
from ringsim.schedule.loops import components
from ringsim.schedule.rotation import rotate
from ringsim.units import format_time


def lanes(job):
    return job.remember("ring", lambda: (Lane(job, components(job), job.kv_block),))


def rows(job, rank, name, block):
    """A rank's tokens of the layer's x or its gradient, `block` at a time; the last has the rest."""
    work, count = job.workload, job.q_block(rank).tokens
    width = work.heads * work.v_head_dim
    for low in range(0, count, block):
        box = ((0, work.batch), (low, min(low + block, count)), (0, width))
        value = f"{name}[{rank}|{low}:{box[1][1]}]"
        yield Region(buffer=name, slot=0, shape=(work.batch, count, width), dtype=work.dtype, value=value, box=box)


def products(region, hidden, count):
    """FLOPs of so many products of a region's tokens with a matrix of width x hidden."""
    batch, tokens, width = region.sizes
    return count * 2 * batch * tokens * width * hidden


def project(job, rank, emit, block):
    """x + out wo: the input of the feed-forward."""
    out, x = job.home("out", job.q_block(rank)), tuple(rows(job, rank, "x", block))
    flops = sum(products(region, region.sizes[2], 1) for region in x)
    yield from emit.compute("project", reads=(out,), writes=x, phase="project", flops=flops)


def layer_back(job, rank, emit, hidden, block, early):  # noqa: PLR0917 - what it is told, then its own arguments
    """The feed-forward's gradients, which make dout, then those of `ring`; `early` posts the first hop of K and V before both."""

    def before():
        yield from project(job, rank, emit, block)
        pairs = list(zip(rows(job, rank, "x", block), rows(job, rank, "dx", block), strict=True))
        for x, dx in pairs:
            # the hidden units again, and two products for each matrix: its own gradient, and that of what it is applied to
            flops = products(x, hidden, 5)
            yield from emit.compute("feed_forward_back", reads=(x,), writes=(dx,), phase="feed_forward", flops=flops)
        # of wo and of out; to the schedule dout is given, whoever makes it
        flops = sum(products(dx, dx.sizes[2], 2) for _, dx in pairs)
        yield from emit.compute("project_back", reads=tuple(dx for _, dx in pairs), writes=(), phase="project", flops=flops)

    if early:
        yield from rotate_back(job, rank, emit, lanes(job), before)
    else:
        yield from before()
        yield from rotate_back(job, rank, emit, lanes(job))


@strategy("blockwise-layer", version=1, turn=any_rank, backward=layer_back)
def layer(job, rank, emit, hidden: int, block: int, early: int = 1):  # noqa: PLR0917 - as above
    """`ring`, the output projection, the feed-forward by blocks of tokens (Ring Attention, arXiv 2310.01889, algorithm 1)."""
    yield from rotate(job, rank, emit, lanes(job))
    yield from project(job, rank, emit, block)
    for x, y in zip(rows(job, rank, "x", block), rows(job, rank, "y", block), strict=True):
        yield from emit.compute("feed_forward", reads=(x,), writes=(y,), phase="feed_forward", flops=products(x, hidden, 2))


TOKENS, HEADS, HEAD_DIM, HIDDEN, BLOCK = 4096, 32, 128, 16384, 512
MACHINES = {
    "a100-pcie-pair": (2, {}),
    "l20-pcie": (8, {}),
    "dgx-h100": (8, {}),
    "dgx-h100-cluster": (32, {"nodes": 4}),
}


def predict(machine, ranks, kv_heads, early):
    """Seconds that the backward pass takes, and of these the communication that nothing hides."""
    work = ringsim.Workload(
        q_len=TOKENS * ranks,
        heads=HEADS,
        kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        dtype="bfloat16",
        mask=ringsim.Causal(),
        pass_="backward",
    )
    text = f"blockwise-layer({HIDDEN}, {BLOCK}, {early})"
    schedule = ringsim.Schedule(workload=work, world_size=ranks, partition="zigzag", strategy=text)
    return ringsim.simulate(schedule, machine).total_s, ringsim.exposed_communication_s(schedule, machine)


def main():
    print(f"a layer's backward pass: {TOKENS} tokens a rank, causal, zigzag, {HEADS} heads of {HEAD_DIM}, {HIDDEN} hidden units")
    print(f"{'':<33}  K and V leave after the feed-forward   before it")
    print(f"{'machine':<16}  {'ranks':>5}  {'kv_heads':>8}  {'total':>16}  {'exposed':>18}   {'total':>9}  {'exposed':>9}")
    for name, (ranks, settings) in MACHINES.items():
        machine = ringsim.load_topology(name, settings)
        for kv_heads in (8, 32):
            late, early = (map(format_time, predict(machine, ranks, kv_heads, early)) for early in (0, 1))
            print("{:<16}  {:>5}  {:>8}  {:>16}  {:>18}   {:>9}  {:>9}".format(name, ranks, kv_heads, *late, *early))


if __name__ == "__main__":
    main()
