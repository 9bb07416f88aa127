"""The NumPy kernel on one rank against torch's fused CPU attention, side by side in one run.

    python benchmarks/attention_cpu.py [--json FILE] [--repeats N] [--patience SECONDS]

Forward, float32, 8 heads, 4096 tokens. In every repeat each contender runs once, so that drift of the machine's clock meets
both. GFLOP/s count visible pairs only: 4 x pairs x head_dim. Where OPENBLAS_CORETYPE or OPENBLAS_L2_SIZE is set, all runs
once more in a subprocess without them. Without torch only ringsim is timed. `others` is the largest number of cores that other
processes used during a repeat (Linux); with --patience a repeat that they disturbed is made again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

import ringsim
from ringsim.backends.cpu import detect_cache
from ringsim.backends.loopback import World
from ringsim.backends.numpy import NumpyBackend
from ringsim.execution import Rank

SEQ_LEN, HEADS = 4096, 8
HEAD_DIMS, THREADS = (64, 128), (1, 2)
PRESETS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
TOLERANCE = 1e-4
QUIET_CORES = 0.1
SETTLE_S = 0.05
"""Pause before each timing: OpenMP's workers spin on after a parallel region."""

Attention = Callable[[], np.ndarray]


def ours(workload: ringsim.Workload, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int) -> Attention:
    """The schedule of one rank, its buffers made once."""
    rank = Rank(ringsim.Schedule(workload=workload, world_size=1), World(1).endpoint(0), NumpyBackend(threads=threads))
    out = np.empty_like(q)

    def attend() -> np.ndarray:
        rank.run(q, k, v, out)
        return out

    return attend


def torchs(workload: ringsim.Workload, q: np.ndarray, k: np.ndarray, v: np.ndarray, threads: int) -> Attention:
    """scaled_dot_product_attention on contiguous (batch, heads, seq, head_dim), its own layout."""
    import torch

    operands = [torch.from_numpy(x).transpose(1, 2).contiguous() for x in (q, k, v)]

    def attend() -> np.ndarray:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            out = torch.nn.functional.scaled_dot_product_attention(*operands, is_causal=workload.causal)
        return out.transpose(1, 2).numpy()

    return attend


def others_cpu_s() -> float:
    """CPU seconds used by all other processes so far, from an arbitrary origin; 0 where /proc/stat is missing."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, path.read_text().partition("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - time.process_time()


def repeat(contenders: dict[str, Attention]) -> tuple[dict[str, float], float]:
    """Seconds of one call of each contender, and the cores that others used meanwhile."""
    seconds, others_s, paused_s = {}, others_cpu_s(), time.perf_counter()
    for name, attend in contenders.items():
        time.sleep(SETTLE_S)
        start_s = time.perf_counter()
        attend()
        seconds[name] = time.perf_counter() - start_s
    return seconds, max(0.0, others_cpu_s() - others_s) / (time.perf_counter() - paused_s)


def measure(workload: ringsim.Workload, threads: int, options: argparse.Namespace, *, with_torch: bool) -> dict[str, Any]:
    """GFLOP/s of every repeat by contender, after one untimed call each. Raises ArithmeticError if they disagree."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, SEQ_LEN, HEADS, workload.head_dim), np.float32) for _ in range(3))
    contenders = {"ringsim": ours(workload, q, k, v, threads)}
    if with_torch:
        contenders["torch"] = torchs(workload, q, k, v, threads)
    results = [attend() for attend in contenders.values()]
    difference = max(float(np.abs(result - results[0]).max()) for result in results)
    if difference > TOLERANCE:
        raise ArithmeticError(f"ringsim and torch differ by {difference:.1e}; at most {TOLERANCE:g} is allowed")
    job = ringsim.Schedule(workload=workload, world_size=1).job
    flops = job.flops(job.tiles(job.q_block(0), job.kv_block(0)))
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    others, give_up_s = [], time.perf_counter() + options.patience
    while len(others) < options.repeats:
        seconds, cores = repeat(contenders)
        if cores > QUIET_CORES and time.perf_counter() < give_up_s:
            time.sleep(1)
            continue
        others.append(cores)
        for name, values in rates.items():
            values.append(flops / seconds[name] / 1e9)
    shape = {"head_dim": workload.head_dim, "causal": workload.causal, "threads": threads}
    return shape | {"gflops_per_s": rates, "others_cores": others, "largest_difference": difference}


def spread(values: list[float]) -> str:
    """Median, and least to greatest."""
    return f"{statistics.median(values):6.1f} ({min(values):.1f}-{max(values):.1f})"


def line(case: dict[str, Any]) -> str:
    """One row of the table; the ratio is the median of the ratios within each repeat."""
    rates = case["gflops_per_s"]
    mask = "causal" if case["causal"] else "full"
    row = f"{case['head_dim']:8}  {mask:6}  {case['threads']:7}  {max(case['others_cores']):6.2f}  {spread(rates['ringsim']):>21}"
    if "torch" not in rates:
        return row
    ratios = [mine / other for mine, other in zip(rates["ringsim"], rates["torch"], strict=True)]
    return f"{row}  {spread(rates['torch']):>21}  {statistics.median(ratios):5.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def facts(*, with_torch: bool) -> dict[str, Any]:
    """What the numbers depend on."""
    cache = detect_cache()
    found: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "level2_nbytes": cache.level2_nbytes,
        "level2_source": cache.source,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
        "environment": {name: value for name, value in os.environ.items() if name.startswith("OPENBLAS_")},
    }
    if with_torch:
        import torch

        found |= {"torch": torch.__version__, "torch_cpu_capability": torch.backends.cpu.get_cpu_capability()}
    return found | {"threadpools": threadpoolctl.threadpool_info()}


def cpu_model() -> str:
    """The processor's name as Linux gives it, else Python's."""
    info = Path("/proc/cpuinfo")
    names = [entry for entry in info.read_text().splitlines() if entry.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def run_here(options: argparse.Namespace) -> dict[str, Any]:
    """All cases under this process's environment, printed as they come."""
    with_torch = importlib.util.find_spec("torch") is not None
    described = facts(with_torch=with_torch)
    for name, value in described.items():
        for entry in value if isinstance(value, list) else [value]:
            print(f"{name}: {entry}")
    if not with_torch:
        print("torch cannot be imported: ringsim alone")
    heading = "head_dim  mask    threads  others      ringsim (GFLOP/s)"
    print(f"{heading}        torch (GFLOP/s)   ringsim / torch" if with_torch else heading)
    cases = []
    for head_dim, causal, threads in product(HEAD_DIMS, (False, True), THREADS):
        mask = ringsim.Causal() if causal else ringsim.Full()
        workload = ringsim.Workload(q_len=SEQ_LEN, heads=HEADS, head_dim=head_dim, mask=mask)
        cases.append(measure(workload, threads, options, with_torch=with_torch))
        print(line(cases[-1]), flush=True)
    return described | {"cases": cases}


def run_unset(options: argparse.Namespace) -> dict[str, Any]:
    """All cases in a subprocess without the presets; OpenBLAS reads them only when it is loaded."""
    environment = {name: value for name, value in os.environ.items() if name not in PRESETS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unset.json"
        command = [sys.executable, __file__, "--repeats", str(options.repeats), "--patience", str(options.patience)]
        subprocess.run([*command, "--json", str(path)], env=environment, stdin=subprocess.DEVNULL, check=True)
        return json.loads(path.read_text())["settings"][0]


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every repeat's rate here")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="timed calls per case and contender (default 7)")
    parser.add_argument(
        "--patience", type=float, default=0.0, metavar="SECONDS", help="per case, for a quiet machine (default 0)"
    )
    options = parser.parse_args()
    shape = {"seq_len": SEQ_LEN, "heads": HEADS, "dtype": "float32", "repeats": options.repeats}
    print(", ".join(f"{name} {value}" for name, value in shape.items()), flush=True)
    settings = [run_here(options)]
    if any(name in os.environ for name in PRESETS):
        print(f"\nwithout {' and '.join(PRESETS)}:", flush=True)
        settings.append(run_unset(options))
    if options.json is not None:
        options.json.write_text(json.dumps(shape | {"settings": settings}, indent=1))


if __name__ == "__main__":
    main()
