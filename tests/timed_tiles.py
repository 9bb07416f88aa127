"""Fused kernels on paper, of a known efficiency."""

from ringsim.tile import Span, Tile

FLOPS = {"attend": 4, "attend_backward": 12.5}
"""Per pair and element of a head, of the kernels here."""


class TimedTiles:
    """Fused kernels whose efficiency grows with the square root of a head's visible pairs."""

    name = "timed"
    nbytes = 0

    def __init__(self, rate, units, work=None, most=0.8, half=300.0, masked=0.9):
        self.rate, self.units, self.work, self.most, self.half, self.masked = rate, units, work, most, half, masked

    def partial(self, dtype):
        return dtype

    def refuses(self, dtype, widths, band, *, backward):
        return None

    def unfit(self, arrays, band):
        return None

    def facts(self):
        return {}

    def efficiency(self, pairs, masked):
        side = pairs**0.5
        return self.most * (self.masked if masked else 1.0) * side / (side + self.half)

    def seconds(self, q_shape, k_rows, band, flops):
        """Of the whole device for a tile of (batch, rows, heads, width)."""
        batch, rows, heads, _ = q_shape
        distance, lo, hi = (0, None, None) if band is None else (band.distance, band.lo, band.hi)
        queries, keys = Span(row=0, count=rows, start=distance), Span(row=0, count=k_rows, start=0)
        pairs = Tile(batch=(0, 1), heads=(0, 1), q=queries, k=keys, lo=lo, hi=hi).pairs()
        busy = min(1.0, batch * heads * -(-rows // 128) / self.units)
        return batch * heads * pairs * flops / (self.rate * self.efficiency(pairs, band is not None) * busy)

    def attend(self, operands, band, scale, stream):
        width = operands.q.shape[3]
        self.work(self.seconds(operands.q.shape, operands.k.shape[1], band, FLOPS["attend"] * width), stream)

    def attend_backward(self, operands, band, scale, stream):
        width = operands.q.shape[3]
        self.work(self.seconds(operands.q.shape, operands.k.shape[1], band, FLOPS["attend_backward"] * width), stream)
