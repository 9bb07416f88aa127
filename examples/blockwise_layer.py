"""A transformer layer around the ring, forward and backward, whose feed-forward is computed block of tokens by block.

python examples/blockwise_layer.py

Attention goes round the ring, so that no rank holds all keys (Ring Attention, arXiv 2310.01889, algorithm 1); the feed-forward's
hidden units are made for one block of a rank's tokens at a time, and made again for the gradients (Blockwise Parallel
Transformer, arXiv 2305.19370). x is (rows, width): this rank's tokens of one sequence.
"""

import tracemalloc
from typing import NamedTuple

import numpy as np

import ringsim
from ringsim.backends.loopback import spawn

EPS, ROTARY_BASE = 1e-5, 10000.0


class Weights(NamedTuple):
    """A layer's weights; their gradients, which `Layer.backward` adds to; or their shapes."""

    norm1: np.ndarray
    wq: np.ndarray
    wk: np.ndarray
    wv: np.ndarray
    wo: np.ndarray
    norm2: np.ndarray
    w1: np.ndarray
    w2: np.ndarray


def shapes(workload, width, hidden):
    q, kv = workload.heads * workload.head_dim, workload.kv_heads * workload.head_dim
    return Weights((width,), (width, q), (width, kv), (width, kv), (q, width), (width,), (width, hidden), (hidden, width))


def norm(x, gain):
    """Root mean square normalisation (arXiv 1910.07467)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * gain


def norm_back(dy, x, gain):
    """The gradients of x and of the gain."""
    scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)
    unit, dunit = x * scale, dy * gain
    return scale * (dunit - unit * np.mean(dunit * unit, axis=-1, keepdims=True)), np.sum(dy * unit, axis=0)


def rotate(x, positions, way=1):
    """Rotary embedding (arXiv 2104.09864) of x (rows, heads, head_dim); its gradient is the rotation back, `way` -1."""
    half = x.shape[-1] // 2
    angles = way * positions[:, None, None] * ROTARY_BASE ** (-np.arange(half) / half)
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate((a * cos - b * sin, a * sin + b * cos), axis=-1)


def feed_forward(x, w, block):
    """x + relu(norm(x) w1) w2: beyond its result it holds the hidden units of `block` rows, never those of all."""
    y = np.empty_like(x)
    for first in range(0, len(x), block):
        rows = slice(first, first + block)
        y[rows] = _forward_rows(x[rows], w)
    return y


def _forward_rows(x, w):
    hidden = norm(x, w.norm2) @ w.w1
    np.maximum(hidden, 0, out=hidden)
    return x + hidden @ w.w2


def feed_forward_back(dy, x, w, grads, block):
    """The gradient of x; those of the weights are added to `grads`. A block's hidden units are computed anew."""
    dx = np.empty_like(x)
    for first in range(0, len(x), block):
        rows = slice(first, first + block)
        dx[rows] = _backward_rows(dy[rows], x[rows], w, grads)
    return dx


def _backward_rows(dy, x, w, grads):
    unit = norm(x, w.norm2)
    hidden = unit @ w.w1
    np.maximum(hidden, 0, out=hidden)
    grads.w2[:] += hidden.T @ dy
    dhidden = dy @ w.w2.T
    dhidden *= hidden > 0
    grads.w1[:] += unit.T @ dhidden
    dx, dgain = norm_back(dhidden @ w.w1.T, x, w.norm2)
    grads.norm2[:] += dgain
    return dy + dx


def flat(x):
    """(rows, heads, head_dim) as (rows, heads * head_dim)."""
    return x.reshape(len(x), -1)


class Layer:
    """Pre-norm attention and feed-forward with residuals on a rank of `plan`, a RingAttention; any number of layers share one."""

    def __init__(self, plan, block):
        self.plan, self.block, self.head_dim = plan, block, plan.schedule.workload.head_dim
        self._q_at, self._kv_at = plan.positions["q"], plan.positions["kv"]

    def attend(self, x, w):
        """Attention up to its output: q, k, v, out and lse, which its backward pass needs."""
        unit = norm(x, w.norm1)
        q, k, v = (self._heads(unit @ matrix) for matrix in (w.wq, w.wk, w.wv))
        self.plan(rotate(q, self._q_at), rotate(k, self._kv_at), v)
        return self.plan.saved

    def forward(self, x, w, keep=True):
        """The layer's output, and what `backward` needs: x, and, but for `keep`, what takes another way round the ring."""
        kept = self.attend(x, w)
        y = feed_forward(x + flat(kept.out) @ w.wo, w, self.block)
        return y, (x, kept if keep else None)

    def backward(self, dy, saved, w, grads):
        """The gradient of x; those of the weights, of this rank's rows, are added to `grads`: sum them over the ranks."""
        x, kept = saved
        kept = kept or self.attend(x, w)
        out = flat(kept.out)
        dmiddle = feed_forward_back(dy, x + out @ w.wo, w, grads, self.block)
        grads.wo[:] += out.T @ dmiddle
        dq, dk, dv = self.plan.backward(self._heads(dmiddle @ w.wo.T), kept)
        unit, dunit = norm(x, w.norm1), np.zeros_like(x)
        for matrix, grad, part in (
            (w.wq, grads.wq, rotate(dq, self._q_at, -1)),
            (w.wk, grads.wk, rotate(dk, self._kv_at, -1)),
            (w.wv, grads.wv, dv),
        ):
            grad[:] += unit.T @ flat(part)
            dunit += flat(part) @ matrix.T
        dx, dgain = norm_back(dunit, x, w.norm1)
        grads.norm1[:] += dgain
        return dmiddle + dx

    def _heads(self, x):
        return x.reshape(len(x), -1, self.head_dim)


SEQ_LEN, WIDTH, HIDDEN, BLOCK, PARTITION = 64, 16, 64, 8, "zigzag"
WORKLOAD = ringsim.Workload(q_len=SEQ_LEN, heads=4, kv_heads=2, head_dim=4, dtype="float64", mask=ringsim.Causal())


def on_ranks(world_size, x, dy, w, keep=True):
    """The layer over ranks in this process: y, the gradient of x, and those of the weights, from that of y."""

    def step(comm):
        with ringsim.RingAttention(WORKLOAD, comm=comm, partition=PARTITION) as plan:
            layer, mine, grads = Layer(plan, BLOCK), plan.positions["q"], Weights(*map(np.zeros_like, w))
            y, saved = layer.forward(x[mine], w, keep)
            return mine, y, layer.backward(dy[mine], saved, w, grads), grads

    ranks = spawn(world_size, step)
    y, dx = np.empty_like(x), np.empty_like(x)
    for mine, *rows, _ in ranks:
        y[mine], dx[mine] = rows
    return y, dx, Weights(*map(sum, zip(*(grads for *_, grads in ranks), strict=True)))


def slopes(x, dy, w, grads, rng):
    """By how much derivatives of sum(y * dy) along a random direction of x and of each weight differ from finite differences.

    Relative to the most that the derivative could be in any direction.
    """
    at, step = (x, *w), 1e-6
    for index, grad in enumerate(grads):
        direction = rng.standard_normal(grad.shape)
        moved = [[a + way * step * direction if i == index else a for i, a in enumerate(at)] for way in (1, -1)]
        ahead, behind = (np.sum(on_ranks(1, a, dy, Weights(*rest))[0] * dy) for a, *rest in moved)
        found = (ahead - behind) / (2 * step)
        yield abs(found - np.sum(grad * direction)) / (np.linalg.norm(grad) * np.linalg.norm(direction))


def peak_nbytes(function, *arguments):
    """The most that Python and NumPy hold at once during a call, beyond what they held before."""
    tracemalloc.start()
    function(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def held_nbytes(rows, width, hidden, block, itemsize=8):
    """Bytes of `feed_forward` and of `feed_forward_back`: what they return, a block's units, and some more of a block's rows.

    Backward a block's units and their gradients, and a product as large as w1, which is then added to the gradients.
    """
    forward = rows * width + block * (hidden + 2 * width)
    backward = rows * width + block * (2 * hidden + width) + max(width * hidden, 6 * block * width)
    return forward * itemsize, backward * itemsize


def peaks(rows, width, hidden, block, rng):
    """The same as measured."""
    x, dy = rng.standard_normal((2, rows, width))
    workload = ringsim.Workload(q_len=rows, heads=1, head_dim=width)
    w = Weights(*(rng.standard_normal(shape) for shape in shapes(workload, width, hidden)))
    grads = Weights(*map(np.zeros_like, w))
    return peak_nbytes(feed_forward, x, w, block), peak_nbytes(feed_forward_back, dy, x, w, grads, block)


def main():
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, SEQ_LEN, WIDTH))
    w = Weights(*(rng.standard_normal(shape) / 4 for shape in shapes(WORKLOAD, WIDTH, HIDDEN)))
    y, dx, grads = on_ranks(1, x, dy, w)
    close = [difference < 1e-8 for difference in slopes(x, dy, w, (dx, *grads), rng)]
    print(f"gradients of x and weights as finite differences have them: {sum(close)} of {len(close)}")
    for world_size in (2, 3, 4):
        same = []
        for keep in (True, False):
            y_ring, dx_ring, grads_ring = on_ranks(world_size, x, dy, w, keep)
            pairs = zip((y_ring, dx_ring, *grads_ring), (y, dx, *grads), strict=True)
            same.append(all(np.allclose(a, b, rtol=0, atol=1e-12) for a, b in pairs))
        print(f"{world_size} ranks: output and gradients are those of one: {same[0]}; with attention computed again: {same[1]}")

    rows, width, block = 512, 64, 32
    print(f"\nfeed-forward of {rows} tokens, {block} at a time, width {width}, float64: kB that it holds beside x and weights")
    print("the last column says whether those of blocks are as measured, to 1 %; those of all at once are the same formulas")
    print(f"{'hidden':>6}  {'forward':>7}  {'all at once':>11}  {'backward':>8}  {'all at once':>11}  as measured")
    for hidden in (width, 4 * width, 16 * width):
        held, whole = held_nbytes(rows, width, hidden, block), held_nbytes(rows, width, hidden, rows)
        measured = peaks(rows, width, hidden, block, rng)
        agrees = all(abs(a - b) < b / 100 for a, b in zip(measured, held, strict=True))
        forward, backward, forward_whole, backward_whole = (nbytes / 1000 for nbytes in (*held, *whole))
        print(f"{hidden:>6}  {forward:>7.0f}  {forward_whole:>11.0f}  {backward:>8.0f}  {backward_whole:>11.0f}  {agrees}")


if __name__ == "__main__":
    main()
