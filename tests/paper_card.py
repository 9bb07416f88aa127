"""A card on paper for benchmarks/gpu.py: the paper GPU, our own kernels on the emulator, and NumPy in place of cuDNN."""

from pathlib import Path

import gpu
import numpy as np
from emulator import Emulator
from gpu_cases import float64
from gpu_cases.card import Ring, Sizes
from paper_gpu import PaperGpu
from paper_tiles import PaperTiles

from ringsim.backends.cuda_attend import OwnTiles
from ringsim.backends.cuda_tiles import Forward
from ringsim.dtypes import numpy_dtype

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"

SMALL = Ring(tokens=48, heads=2, kv_heads=1, head_dim=16)
TINY = Sizes(
    matmul_rows=8,
    copy_nbytes=1024,
    repeats=2,
    spin_s=1e-4,
    tile_rows=((17, 20),),
    tile_heads=((2, 1),),
    tile_widths=((64, 64), (5, 3)),
    kernel_rows=7,
    loss=SMALL,
    strategies=Ring(tokens=40, heads=4, kv_heads=2, head_dim=16),
    strategy_dtypes=("bfloat16",),
    races=Ring(tokens=64, heads=2, kv_heads=2, head_dim=16),
    race_seeds=6,
    speed=SMALL,
    speed_blocks=(1, 4),
    sharing=SMALL,
    sharing_ranks=(1, 2),
    held_out=(SMALL, Ring(tokens=60, heads=2, kv_heads=2, head_dim=16)),
    million=Ring(tokens=256, heads=2, kv_heads=2, head_dim=16),
    million_rows=16,
)


class PaperCall:
    """One fused call: NumPy."""

    def __init__(self, gpu, *, ordered):
        self._tiles, self._gpu, self.ordered = PaperTiles(gpu, half=True), gpu, ordered

    def forward(self, operands, band, scale, stream):
        self._tiles.attend(Forward(*operands[:5]), band, scale, stream)

    def backward(self, operands, band, scale, stream):
        def run():
            q, k, v, out, lse, dout = (one.view(np.ndarray).astype(np.float64) for one in operands[:6])
            seen = float64.seen_pairs(band, q.shape[1], k.shape[1])
            found = float64.backward(np, q, k, v, dout, lse, float64.delta_of(np, out, dout), seen, scale)
            for target, values in zip(operands[6:], found, strict=True):
                target.view(np.ndarray)[...] = values.astype(target.dtype)

        self._gpu.defer(run, stream)


class PaperCard:
    """`Card`; `paper` has NumPy in place of every kernel but those over state."""

    xp = np
    missing = {}  # noqa: RUF012 - nothing is

    def __init__(self, seed=0, *, own=True):
        self.emulator = Emulator()
        self.calls = PaperGpu(seed, run=self.emulator.launch)
        self.kinds = {"cudnn": lambda calls: PaperTiles(self.calls, half=True)}
        if own:
            self.kinds |= {"own": OwnTiles, "own plain": lambda calls: OwnTiles(calls, plain=True)}
        self.built = []

    def tiles(self, calls):
        return (PaperTiles(self.calls, half=True),)

    def one_call(self, *, ordered):
        return PaperCall(self.calls, ordered=ordered)

    def build(self, kernel):
        self.built.append(kernel)

    def facts(self):
        return {"device": "paper", "uuid": "paper", "units": 4, "memory_nbytes": 2**30}

    def exact(self, array):
        return np.array(self.calls.download(array)).astype(np.float64)

    def upload(self, array):
        return self.calls.upload(np.asarray(array))

    def normal(self, shape, dtype, seed):
        return self.upload(np.random.default_rng(seed).standard_normal(shape).astype(numpy_dtype(dtype)))

    def spin(self, stream, seconds):
        for _ in range(3):
            self.calls.defer(lambda: None, stream)

    def settle(self):
        self.calls.drain()

    def free_nbytes(self):
        return 2**40 - sum(self.calls.allocated)

    def pool_nbytes(self):
        return 0

    def matmul(self, rows, dtype, stream):
        return lambda: self.calls.defer(lambda: None, stream)


def asked(tmp_path, *words):
    """The command line's options, with a file in `tmp_path`."""
    return gpu.options(["--out", str(tmp_path / "gpu.json"), "--no-mpi", *words])


def bench_of(card, tmp_path, sizes=TINY, **more):
    """What a section is given."""
    from gpu_cases.bench import Bench

    return Bench(card=card, sizes=sizes, folder=tmp_path, **more)


def section(run, card, tmp_path, sizes=TINY, **more):
    """What one section found on a card; raises what it raised."""
    from gpu_cases.record import Record

    record = Record("section", began=True)
    run(bench_of(card, tmp_path, sizes, **more), record)
    return record
