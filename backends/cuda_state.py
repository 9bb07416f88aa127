"""The CUDA kernels that pass over arrays once: running state, and what the backward pass needs before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ringsim.backends.cuda import Calls, DeviceArray, Stream
from ringsim.backends.cuda_folding import (
    Folding,
    Partial,
    State,
    across,
    folding_of,
    operands_of,
    partial_dtype,
    require_same,
    sides_of,
    slots_of,
    state_places,
)
from ringsim.backends.cuda_strides import axes_of, place_of, record
from ringsim.backends.cuda_variants import KERNELS, UNITS, Types, columns_of, delta_types, merge_types, pair_types, variant
from ringsim.errors import ArrayError

__all__ = ["KERNELS", "Partial", "State", "StateKernels"]
MOST_WIDTH: Final = 2**16 - 2
"""Elements of a row that `stand_in.cu` can number."""


class StateKernels:
    """Queues kernels over state, sums and gradients; arrays are views with a dense last axis whose other strides are free.

    A launch is deterministic and allocates nothing. Arrays without elements launch nothing. Raises ArrayError for arrays that
    do not fit one another or that no kernel is compiled for.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def merge_partials(self, state: State, fresh: bool, partials: Sequence[Partial], stream: Stream) -> None:
        """Fold at most MOST_PARTIALS partial results into a state, in one pass; where `fresh`, what it held is not read.

        Each is a state whose sum is 1 and whose maximum is its lse. Rows that none covers, or whose lse are -inf, keep what they
        held: acc 0, max -inf, sum 0 if fresh.
        """
        acc, row_max, row_sum = state
        if not acc.size or not (partials or fresh):
            return
        places = state_places(acc, row_max, row_sum)
        folding = folding_of(places, None, fresh, slots_of(places[0].shape, partials))
        types = merge_types(acc.dtype.name, partial_dtype(partials, acc.dtype.name))
        self._launch("merge_partials", types, folding, (acc, row_max, row_sum, *operands_of(partials)), stream)

    def finish_partials(  # noqa: PLR0917 - in the order in which they are used
        self,
        state: State | None,
        fresh: bool,
        partials: Sequence[Partial],
        out: DeviceArray,
        lse: DeviceArray,
        stream: Stream,
    ) -> None:
        """Write what a state would be after `merge_partials` as out = acc / sum and lse = max + log(sum); the state stays.

        out (batch, rows, heads, width), any dtype; lse (batch, heads, rows) in the state's dtype. Rows that saw no key give 0 and
        -inf. A fresh state may be None.
        """
        if state is None and not fresh:
            raise ArrayError("finish_partials: a state that has seen keys must be given; None stands for a fresh one only")
        if not out.size:
            return
        held = None if fresh or state is None else state
        result = place_of(out), place_of(lse)
        batch, rows, heads, width = result[0].shape
        slots = slots_of((batch, heads, rows, width), partials)
        folding = folding_of(None if held is None else state_places(*held), result, fresh, slots)
        if held is not None:
            require_same("finish_partials", held[0].dtype, lse.dtype)
        types = (*merge_types(lse.dtype.name, partial_dtype(partials, lse.dtype.name)), ("RESULT", out.dtype.name))
        self._launch("finish_partials", types, folding, (*(held or (None,) * 3), out, lse, *operands_of(partials)), stream)

    def merge(self, mine: State, other: State, stream: Stream) -> None:
        """Merge the state `other` into `mine`, both as `merge_partials` leaves them: numpy_state.merge."""
        if not mine[0].size:
            return
        places = *state_places(*mine), *state_places(*other)
        require_same("merge", (places[0].shape, mine[0].dtype), (places[3].shape, other[0].dtype))
        self._launch("merge", (("STATE", mine[0].dtype.name),), sides_of(places), (*mine, *other), stream)

    def delta(self, out: DeviceArray, dout: DeviceArray, target: DeviceArray, stream: Stream) -> None:
        """Write delta (batch, heads, rows) = rowsum(dout * out) of arrays (batch, rows, heads, width), in target's dtype."""
        if not target.size:
            return
        require_same("delta", out.dtype, dout.dtype)
        folding = across("delta", place_of(out), place_of(dout), place_of(target))
        self._launch("delta", delta_types(target.dtype.name, out.dtype.name), folding, (out, dout, target), stream)

    def stand_in(self, dout: DeviceArray, delta: DeviceArray, target: DeviceArray, stream: Stream) -> None:
        """Write a row per row of dout (batch, rows, heads, width) with rowsum(dout * row) = delta (batch, heads, rows), float32.

        cuDNN's backward takes `out` and forms delta from it; a schedule that carries delta in place of `out`, a width-th of the
        bytes, has none to give. A row has at most three entries that are not 0: delta / dout at the largest of |dout|, what
        rounding left at the second largest, and what that left at the smallest that is not below 2**-12 of the largest. Each
        takes all but 2**-8 (bfloat16) or 2**-11 (float16) of what was left, or all but half its own least step (float16: 2**-25)
        times that dout: with three elements of dout to use, |rowsum - delta| <= 1.001 * 2**-24 |delta| + 2**-25 min(|dout| used),
        the second term for float16 alone. A row of zeros gives zeros. NaN where dout or delta is not finite, and where delta is
        beyond the two largest |dout| times the dtype's largest number.
        """
        if not target.size:
            return
        require_same("stand_in", (target.dtype, "float32"), (dout.dtype, delta.dtype.name))
        if target.shape[3] > MOST_WIDTH:
            raise ArrayError(f"stand_in: rows of {target.shape[3]} elements, at most {MOST_WIDTH} can be numbered")
        folding = across("stand_in", place_of(target), place_of(dout), place_of(delta))
        self._launch("stand_in", (("ELEMENT", dout.dtype.name),), folding, (dout, delta, target), stream)

    def copy(self, target: DeviceArray, source: DeviceArray, stream: Stream) -> None:
        """Copy an array of any strides to another of the same shape and dtype: numpy_state.pack."""
        require_same("copy", (target.shape, target.dtype), (source.shape, source.dtype))
        self._move("copy", (target, source), stream)

    def clear(self, array: DeviceArray, stream: Stream) -> None:
        """Write 0."""
        self._move("clear", (array,), stream)

    def accumulate(self, total: DeviceArray, addend: DeviceArray, stream: Stream) -> None:
        """Add an array to another of its shape, in the total's dtype; the addend may be in half precision."""
        self._combine("accumulate", total, addend, stream)

    def cast(self, target: DeviceArray, source: DeviceArray, stream: Stream) -> None:
        """Copy sums to an array of their shape in another dtype, rounded to nearest; numpy_state.cast."""
        if target.dtype == source.dtype:
            self.copy(target, source, stream)
        else:
            self._combine("cast", target, source, stream)

    def _combine(self, name: str, target: DeviceArray, source: DeviceArray, stream: Stream) -> None:
        require_same(name, target.shape, source.shape)
        if not target.size:
            return
        dtypes = target.dtype.name, source.dtype.name
        axes = axes_of(place_of(target), place_of(source), columns_of(*dtypes))
        self._launch(name, pair_types(*dtypes, axes.columns), Folding(axes.words, axes.launch), (target, source), stream)

    def _move(self, name: str, arrays: tuple[DeviceArray, ...], stream: Stream) -> None:
        if not arrays[0].size:
            return
        itemsize = arrays[0].dtype.itemsize
        columns = tuple(unit // itemsize for unit in UNITS if unit >= itemsize)
        axes = axes_of(place_of(arrays[0]), place_of(arrays[-1]), columns)
        # positions are this kernel's elements
        words = (*axes.words[:4], *(stride // axes.columns for stride in axes.words[4:]))
        self._launch(name, (("UNIT", str(axes.columns * itemsize)),), Folding(words, axes.launch), arrays, stream)

    def _launch(self, name: str, types: Types, folding: Folding, arrays: Sequence[Any], stream: Stream) -> None:
        self._calls.launch(variant(name, types), folding.launch, (record(folding.words), *arrays), stream)
