"""What cuDNN's attention takes and what it refuses, so that nothing is asked of it in vain.

Sources: cuDNN frontend 1.32, `include/cudnn_frontend/node/sdpa_support_surface.h` (forward) and
`scaled_dot_product_flash_attention.h` (`CompositeSDPABackwardNode::pre_validate_node`), and the support matrix of
docs.nvidia.com/cudnn, "Attention".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from ringsim.backends.cuda import DeviceArray
from ringsim.backends.cuda_strides import address_of
from ringsim.backends.cuda_tiles import Backward, Band

DTYPES: Final = ("float16", "bfloat16")
OLDEST: Final = 91300
"""Of cuDNN's versions, as ``10000 * major + 100 * minor + patch``: the first that has no known fault in what is used here."""
LSE_READ_WITH_STRIDES: Final = 92600
"""The first version whose backward pass reads lse by its strides; its forward pass writes it so from 9.12 on."""
ORDERED_DQ: Final = 92500
ALIGNMENT: Final = 16
"""Bytes: cuDNN's kernels read q, k, v and out by 16-byte vectors and do not look (issue 1571 of the frontend)."""
WIDEST: Final = 256
EXACT_IN_FLOAT32: Final = 1 << 24

Bounds = tuple[int | None, int | None]


class Given(NamedTuple):
    """cuDNN's version (``10000 * major + 100 * minor + patch``) and the device's compute capability."""

    version: int
    capability: tuple[int, int]

    @property
    def squares(self) -> bool:
        """Whether a deterministic backward pass stores a number for each pair of a tile unless told otherwise.

        On Hopper it can be told otherwise from cuDNN 9.25 on, on Blackwell (10.x) it never does.
        """
        return self.capability[0] != 10


def bounds_of(band: Band | None) -> Bounds | None:
    """Left and right bound, as cuDNN has them, of a band aligned top left; None for a band that has none.

    cuDNN keeps the pair (i, j) if ``j + left > i`` and ``j <= i + right``; left is at least 1, right at least 0
    (`attn_score_modifiers.h`, `sliding_window_mask`). So ``low <= i - j <= high`` is right = -low and left = high + 1. A part
    of a tile (`part_of`) begins with a pair that is seen, (0, 0), hence low <= 0 <= high wherever the steps are equal.
    """
    if band is None:
        return None, None
    diagonals = band.diagonals()
    if diagonals is None:
        return None
    low, high = diagonals
    if (low is not None and low > 0) or (high is not None and high < 0):
        return None
    return (None if high is None else high + 1), (None if low is None else -low)


def refusals(given: Given, dtype: str, widths: tuple[int, int], band: Band | None, *, backward: bool) -> Iterator[str]:
    """Why cuDNN computes no such tiles, whatever their rows."""
    major, said = given.capability[0], f"cuDNN {spelled(given.version)}"
    if dtype not in DTYPES:
        yield f"cuDNN's attention takes {' and '.join(DTYPES)}, not {dtype}"
    if given.version < OLDEST:
        yield f"{said} is older than {spelled(OLDEST)}: upgrade nvidia-cudnn-cu12 or nvidia-cudnn-cu13"
    if major < 8:
        yield f"cuDNN's attention needs compute capability 8.0, and this device has {major}.{given.capability[1]}"
    if any(width % 8 for width in widths):
        yield f"cuDNN wants head_dim and v_head_dim in multiples of 8, not {widths[0]} and {widths[1]}"
    if max(widths) > WIDEST:
        yield f"cuDNN takes head_dim and v_head_dim up to {WIDEST}, not {widths[0]} and {widths[1]}"
    bounds = bounds_of(band)
    if bounds is None:
        yield "cuDNN's band has bounds on i - j that include 0, and this one has none" + (
            "" if band is None or band.q_step == band.k_step else f" (steps of {band.q_step} and {band.k_step})"
        )
    elif given.version == 91400 and bounds[0] is not None and bounds[1] is None:
        yield "cuDNN 9.14.0 computes windows without a causal side wrongly: upgrade it"
    if backward:
        yield from _backward_refusals(given, widths)


def _backward_refusals(given: Given, widths: tuple[int, int]) -> Iterator[str]:
    major, said = given.capability[0], f"cuDNN {spelled(given.version)}"
    if major == 10:
        takes = max(widths) <= 128 or widths == (192, 128) or (widths == (256, 256) and given.version >= 92300)
        if given.version < 91800:
            yield f"{said} has no deterministic backward pass on Blackwell: upgrade to 9.18"
    else:
        takes = max(widths) <= (256 if major == 9 else 128)
    if not takes:
        yield f"{said} has no backward pass for head_dim {widths[0]}, v_head_dim {widths[1]} on compute capability {major}.x"


def misfits(given: Given, arrays: Sequence[DeviceArray], band: Band | None, *, most_scores: int) -> Iterator[str]:
    """Why a tile of a kind that cuDNN computes does not suit it: rows, strides and addresses of (q, k, v), or of
    (q, k, v, dout) in the backward pass.
    """
    rows, keys, backward = arrays[0].shape[1], arrays[1].shape[1], len(arrays) > 3
    left = (bounds_of(band) or (None, None))[0]
    if left is not None and rows > keys:
        yield f"cuDNN's windows want no more queries than keys, not {rows} and {keys}"
    if left is not None and left + keys > EXACT_IN_FLOAT32:
        yield f"cuDNN compares a window of {left} in float32, which does not count to {left + keys}"
    if backward and rows == keys == 1:
        yield "cuDNN has no backward pass of one query and one key"
    for name, array in zip(("q", "k", "v", "dout"), arrays, strict=False):
        found = misaligned(name, array)
        if found is not None:
            yield found
    if backward:
        needed = least_scores_nbytes(arrays[0], arrays[1])
        if stores_scores(given) and needed > most_scores:
            yield f"cuDNN's deterministic backward pass would store {needed} bytes a head, 2 of each pair (limit: {most_scores})"


def misaligned(name: str, array: DeviceArray) -> str | None:
    """What of an array's address or strides is no multiple of 16 bytes, or None."""
    if address_of(array) % ALIGNMENT:
        return f"{name} lies at an address that is no multiple of {ALIGNMENT}, which cuDNN's vector loads want"
    if any(stride % ALIGNMENT for stride, count in zip(array.strides[:-1], array.shape[:-1], strict=True) if count > 1):
        return f"{name} has strides of {array.strides} bytes, not all multiples of {ALIGNMENT}, which cuDNN wants"
    return None


def stores_scores(given: Given) -> bool:
    """Whether the deterministic backward pass keeps the score gradients, and no other way is there."""
    return given.squares and not (given.capability[0] == 9 and given.version >= ORDERED_DQ)


def least_scores_nbytes(q: DeviceArray, k: DeviceArray) -> int:
    """Bytes of the score gradients of the query heads of one key/value head of one sequence: what one call must do together."""
    group = q.shape[2] // k.shape[2]
    return scores_nbytes(q[:1, :, :group], k.shape[1])


def shares_of(operands: Backward, most_scores: int | None) -> Iterator[Backward]:
    """A tile cut by sequences and key/value heads, so that the score gradients of each part stay within a limit."""
    q, k = operands.q, operands.k
    sequences, heads = q.shape[0], k.shape[2]
    if most_scores is not None and scores_nbytes(q, k.shape[1]) > most_scores:
        heads = max(1, min(heads, most_scores // max(1, least_scores_nbytes(q, k))))
        sequences = 1
    group = q.shape[2] // k.shape[2]
    for batch in range(0, q.shape[0], sequences):
        for head in range(0, k.shape[2], heads):
            own = slice(head, min(head + heads, k.shape[2]))
            of_queries, of_keys = slice(own.start * group, own.stop * group), own
            some = slice(batch, batch + sequences)
            yield Backward(
                q=q[some, :, of_queries],
                k=k[some, :, of_keys],
                v=operands.v[some, :, of_keys],
                dout=operands.dout[some, :, of_queries],
                lse=operands.lse[some, of_queries],
                delta=operands.delta[some, of_queries],
                dq=operands.dq[some, :, of_queries],
                dk=operands.dk[some, :, of_keys],
                dv=operands.dv[some, :, of_keys],
            )


def scores_nbytes(q: DeviceArray, keys: int) -> int:
    """Bytes of the score gradients of a tile, as cuDNN's deterministic backward pass stores them (`expand_node`)."""
    batch, rows, heads, _ = q.shape
    return int(batch * heads * (-(-rows // 64) * 64) * (-(-keys // 128) * 128) * 2)


def spelled(version: int) -> str:
    """92800 as 9.28.0."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
