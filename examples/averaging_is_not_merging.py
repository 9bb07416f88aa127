"""Averaging the blocks' outputs is not ring attention; merging them by log-sum-exp is.

Keys and values are cut into 4 blocks; each query attends to each block alone, giving out_b and lse_b. Combined by

    mean       equal weights over the blocks that the query sees
    by length  weights in proportion to the keys that the query sees in the block
    merge      weights exp(lse_b - lse), lse = log sum_b exp(lse_b): the share of the softmax's denominator in block b

and compared with dense attention in float64, as the logits' scale grows. `ringsim` is the executor on 4 ranks. Each cell is
the largest difference, and in brackets the norm of the difference over the norm of the dense output.
"""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np

import ringsim
from ringsim.reference import dense_attention

TOKENS, HEADS, HEAD_DIM, SEED = 256, 4, 32, 0
EDGES = (0, 96, 160, 192, 256)
LOGIT_STDS = (0.1, 1.0, 4.0, 16.0)
EXACT = 1e-12


def attention_of_blocks(workload, q, k, v):
    """Blocks first: out (batch, seq, heads, head_dim), lse (batch, heads, seq) and visible keys (1, 1, seq)."""
    outs, lses, counts = [], [], []
    for begin, end in pairwise(EDGES):
        block = replace(workload, kv_len=end - begin, kv_offset=begin)
        out, lse = dense_attention(block, q, k[:, begin:end], v[:, begin:end])
        outs.append(out)
        lses.append(lse)
        counts.append(workload.mask.visible(np.arange(TOKENS), np.arange(begin, end)).sum(axis=1)[None, None])
    return np.array(outs), np.array(lses), np.array(counts)


def combined(outs, weights):
    """Mean of the blocks' outputs; weights (blocks, batch, heads, seq)."""
    shares = weights / weights.sum(axis=0)
    return (np.moveaxis(shares, 3, 2)[..., None] * outs).sum(axis=0)


def candidates(workload, q, k, v):
    """The output under each rule, by name."""
    outs, lses, counts = attention_of_blocks(workload, q, k, v)
    return {
        "mean": combined(outs, counts > 0),
        "by length": combined(outs, counts),
        "merge": combined(outs, np.exp(lses - lses.max(axis=0))),
        "ringsim": ringsim.execute(ringsim.Schedule(workload=workload, world_size=len(outs)), q, k, v).out,
    }


def cell(out, dense):
    error, relative = np.abs(out - dense).max(), np.linalg.norm(out - dense) / np.linalg.norm(dense)
    return f"< {EXACT:.0e}" if max(error, relative) < EXACT else f"{error:.3f} ({relative:.1%})"


def main():
    rng = np.random.default_rng(SEED)
    q, k, v = (rng.standard_normal((1, TOKENS, HEADS, HEAD_DIM)) for _ in range(3))
    print(f"{'mask':8}{'logit std':>10}  {'mean':>16}{'by length':>16}{'merge':>10}{'ringsim':>10}")
    for mask, logit_std in product((ringsim.Full(), ringsim.Causal()), LOGIT_STDS):
        scale = logit_std * HEAD_DIM**-0.5
        workload = ringsim.Workload(q_len=TOKENS, heads=HEADS, head_dim=HEAD_DIM, dtype="float64", mask=mask, softmax_scale=scale)
        dense, _ = dense_attention(workload, q, k, v)
        cells = {name: cell(out, dense) for name, out in candidates(workload, q, k, v).items()}
        print(
            f"{mask.name:8}{logit_std:10g}  {cells['mean']:>16}{cells['by length']:>16}{cells['merge']:>10}{cells['ringsim']:>10}"
        )


if __name__ == "__main__":
    main()
