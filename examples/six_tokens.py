"""Ring attention by hand: 6 tokens on 3 ranks, one head, head_dim 2, every intermediate value printed.

Rank r keeps the queries of tokens 2r and 2r+1; at step s it holds the keys and values of block r-s. Schedule and executor
are ringsim's own; a backend around NumpyBackend looks at the running state after each `attend`.

The state is max, sum = sum exp(score - max) and acc = sum exp(score - max) v. For scores this small NumpyBackend leaves
max at 0, which cancels in acc / sum; printed are the true running maximum and sum * exp(0 - maximum), as on paper.
"""

import numpy as np

import ringsim
from ringsim.backends.loopback import World
from ringsim.backends.numpy import NumpyBackend
from ringsim.execution import Rank, drive_all
from ringsim.reference import dense_attention

WORLD_SIZE = 3
Q = [[1, 0], [0, 1], [1, 1], [2, 0], [0, 2], [1, -1]]
K = [[1, 0], [0, 1], [1, 1], [2, 0], [0, 2], [2, 1]]
V = [[1, 0], [0, 1], [2, 0], [0, 2], [4, 0], [0, 4]]


class Observed(NumpyBackend):
    """`states` holds one line per query row after each step's attend."""

    def __init__(self, tokens):
        super().__init__()
        self.states = {}
        self._tokens = tokens
        self._running_max = np.full(len(tokens), -np.inf)

    def compute(self, op, fetch, *, scale, poll):
        super().compute(op, fetch, scale=scale, poll=poll)
        if op.kernel == "attend":
            self.states[op.step] = [f"holds {op.reads[1].value} {op.reads[2].value}", *self._rows(op, fetch, scale)]

    def _rows(self, op, fetch, scale):
        q, k = (fetch(region)[0, :, 0] for region in op.reads[:2])
        acc, reference, row_sum = (fetch(region)[0, 0] for region in op.writes)
        scores = np.where(visible(op.tiles, len(q), len(k)), scale * q @ k.T, -np.inf)
        self._running_max = np.maximum(self._running_max, scores.max(axis=1))
        paper_sum = row_sum * np.exp(reference - self._running_max)
        out = acc / row_sum[:, None]
        for row, token in enumerate(self._tokens):
            shown = " ".join("   ." if score == -np.inf else f"{score:4.0f}" for score in scores[row])
            state = f"max {self._running_max[row]:2.0f}  sum {paper_sum[row]:.4f}  out {out[row, 0]:.4f} {out[row, 1]:.4f}"
            yield f"token {token}  scores {shown}   {state}"


def visible(tiles, rows, keys):
    """The pairs that the schedule's tiles cover, (rows, keys)."""
    seen = np.zeros((rows, keys), bool)
    for tile in tiles:
        for row, (begin, end) in enumerate(zip(*tile.intervals(), strict=True), start=tile.q.row):
            seen[row, tile.k.row + begin : tile.k.row + end] = True
    return seen


def run(schedule, q, k, v):
    """Walk the schedule on all ranks; returns the global output and each rank's backend."""
    world, split = World(WORLD_SIZE), schedule.job.q_partition
    out = np.empty_like(q)
    backends = [Observed(split.positions(rank)) for rank in range(WORLD_SIZE)]
    ranks = [Rank(schedule, world.endpoint(rank), backend) for rank, backend in enumerate(backends)]
    shards = [[ringsim.shard(x, comm=rank.transport) for x in (q, k, v, out)] for rank in ranks]
    walkers = [rank.walker(*shard) for rank, shard in zip(ranks, shards, strict=True)]
    drive_all(walkers)
    for rank, walker in zip(ranks, walkers, strict=True):
        rank.finish(walker)
    return out, backends


def show(mask):
    q, k, v = (np.array(x, float).reshape(1, 6, 1, 2) for x in (Q, K, V))
    # scale 1 keeps the scores integers
    workload = ringsim.Workload(q_len=6, heads=1, head_dim=2, dtype="float64", mask=mask, softmax_scale=1.0)
    schedule = ringsim.Schedule(workload=workload, world_size=WORLD_SIZE)
    schedule.validate()
    out, backends = run(schedule, q, k, v)
    print(f"== mask: {mask.name} ==")
    for step in range(WORLD_SIZE):
        for rank, backend in enumerate(backends):
            head, *rows = backend.states.get(step, ["has no tile: the mask hides the whole block"])
            print(f"step {step}, rank {rank} {head}")
            for row in rows:
                print(f"    {row}")
    dense, _ = dense_attention(workload, q, k, v)
    print("token   ring             dense")
    for token in range(6):
        ring_row, dense_row = (f"{x[0, token, 0, 0]:.4f} {x[0, token, 0, 1]:.4f}" for x in (out, dense))
        print(f"{token}       {ring_row}    {dense_row}")
    print(f"largest difference {np.abs(out - dense).max():.12f}\n")


if __name__ == "__main__":
    print("token    q      k      v")
    for token, (query, key, value) in enumerate(zip(Q, K, V, strict=True)):
        print(f"{token}     {query[0]:2} {query[1]:2}  {key[0]:2} {key[1]:2}  {value[0]:2} {value[1]:2}")
    print()
    show(ringsim.Full())
    show(ringsim.Causal())
