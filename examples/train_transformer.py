"""A small transformer trained over MPI: the loss is that of one rank, step by step.

    mpiexec -n 4 python examples/train_transformer.py

Each rank holds its tokens of every sequence and all weights; attention goes round the ring, gradients are summed over the ranks.
"""

import numpy as np
from blockwise_layer import Layer, Weights, norm, norm_back, shapes  # beside this file
from mpi4py import MPI

import ringsim

VOCABULARY, SEQ_LEN, LAYERS, WIDTH, HIDDEN, BLOCK, PARTITION = 256, 128, 2, 32, 128, 8, "zigzag"
LETTERS = 16
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
RATE, DECAY, EPS = 0.01, (0.9, 0.99), 1e-8


def text(step):
    """The bytes of a training step: two of the letters a to p in turn, drawn anew for each.

    Which comes next only the tokens before can tell: without attention no loss is below log 16 = 2.77 for long.
    """
    return np.resize(ord("a") + np.random.default_rng(step).integers(LETTERS, size=2), SEQ_LEN + 1)


class Model:
    """Weights, or their gradients, in one vector `all`; each by its name is a view of it."""

    def __init__(self, workload, dtype):
        layer = shapes(workload, WIDTH, HIDDEN)
        wanted = [(VOCABULARY, WIDTH), *(LAYERS * layer), (WIDTH,), (WIDTH, VOCABULARY)]
        sizes = [int(np.prod(shape)) for shape in wanted]
        self.all = np.zeros(sum(sizes), dtype)
        parts = np.split(self.all, np.cumsum(sizes)[:-1])
        self.embedding, *inner, self.norm, self.head = (part.reshape(shape) for part, shape in zip(parts, wanted, strict=True))
        self.layers = [Weights(*inner[first : first + len(layer)]) for first in range(0, len(inner), len(layer))]

    def draw(self, rng):
        """Random weights; gains of norms are 1."""
        for matrix in (self.embedding, self.head, *(matrix for layer in self.layers for matrix in layer)):
            matrix[:] = rng.standard_normal(matrix.shape) / np.sqrt(matrix.shape[0]) if matrix.ndim > 1 else 1
        self.norm[:] = 1


def back_and_forth(model, grads, layer, ids, targets):
    """This rank's part of the mean loss of a sequence's tokens; its part of the gradients is added to `grads`."""
    x, kept = model.embedding[ids], []
    for w in model.layers:
        x, saved = layer.forward(x, w)
        kept.append(saved)
    unit, rows = norm(x, model.norm), np.arange(len(ids))
    chances = unit @ model.head
    chances = np.exp(chances - chances.max(axis=-1, keepdims=True))
    chances /= chances.sum(axis=-1, keepdims=True)
    loss = -np.log(chances[rows, targets]).sum() / SEQ_LEN
    chances[rows, targets] -= 1
    dlogits = chances / SEQ_LEN
    grads.head[:] += unit.T @ dlogits
    dx, dgain = norm_back(dlogits @ model.head.T, x, model.norm)
    grads.norm[:] += dgain
    for w, grad, saved in zip(reversed(model.layers), reversed(grads.layers), reversed(kept), strict=True):
        dx = layer.backward(dx, saved, w, grad)
    np.add.at(grads.embedding, ids, dx)
    return float(loss)


def train(comm, steps, dtype="float64", strategy="ring"):
    """The loss of each step: the mean over all tokens of all ranks. Adam (arXiv 1412.6980)."""
    workload = ringsim.Workload(
        q_len=SEQ_LEN, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype, mask=ringsim.Causal()
    )
    model, grads = Model(workload, dtype), Model(workload, dtype)
    model.draw(np.random.default_rng(0))
    first, second, losses = np.zeros_like(model.all), np.zeros_like(model.all), []
    with ringsim.RingAttention(workload, comm=comm, partition=PARTITION, strategy=strategy, threads=1) as plan:
        layer, mine = Layer(plan, BLOCK), plan.positions["q"]
        for step in range(steps):
            ids = text(step)
            grads.all[:] = 0
            loss = back_and_forth(model, grads, layer, ids[mine], ids[mine + 1])
            losses.append(comm.allreduce(loss))
            comm.Allreduce(MPI.IN_PLACE, grads.all)
            first += (1 - DECAY[0]) * (grads.all - first)
            second += (1 - DECAY[1]) * (grads.all**2 - second)
            mean, square = first / (1 - DECAY[0] ** (step + 1)), second / (1 - DECAY[1] ** (step + 1))
            model.all -= RATE * mean / (np.sqrt(square) + EPS)
    return losses


def main():
    comm, steps = MPI.COMM_WORLD, 50
    ring, alone = train(comm, steps), train(MPI.COMM_SELF, steps)
    if comm.rank == 0:
        print(f"mean loss of steps  on {comm.size} ranks  on one")
        for first in range(0, steps, 10):
            means = [np.mean(losses[first : first + 10]) for losses in (ring, alone)]
            print(f"{first:>9} to {first + 9:>2}       {means[0]:>10.4f}  {means[1]:.4f}")
        print(f"without attention at best {np.log(LETTERS):.4f}")
        print(f"every step's loss is the same to 1e-9, relative: {np.allclose(ring, alone, rtol=1e-9, atol=0)}")


if __name__ == "__main__":
    main()
