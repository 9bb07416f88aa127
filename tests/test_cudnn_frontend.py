"""What is asked of cuDNN is planned by the real one where it is installed: a GPU is not needed, and nothing is executed."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ringsim.backends.cuda_tiles import Band

from .cudnn_bench import seen_pairs

ARCHS = (80, 89, 90, 100, 120)
WIDTHS = ((64, 64), (128, 128), (40, 72), (96, 64), (192, 128), (256, 256), (160, 160))


def drawn(rng):
    """A case as a part of a tile is: its first and its last pair are seen."""
    while True:
        rows, keys = (rng.choice((1, 2, 7, 64, 200, 1000)) for _ in range(2))
        lo, hi = (rng.choice((None, rng.randint(-rows, keys))) for _ in range(2))
        band = None if lo is None and hi is None else Band(rng.randint(-5, 5), 1, 1, lo, hi)
        seen = seen_pairs(band, rows, keys)
        if seen[0, 0] and seen[-1, -1]:
            break
    kv_heads = rng.choice((1, 2))
    widths = rng.choice(WIDTHS)
    return {
        "arch": rng.choice(ARCHS),
        "dtype": rng.choice(("float16", "bfloat16")),
        "shape": (rng.choice((1, 2)), rows, keys, kv_heads * rng.choice((1, 3)), kv_heads, *widths),
        "band": band,
        "room": rng.choice((0, 24)),
        "backward": rng.random() < 0.5,
        "most_scores": 1 << 30,
    }


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Plans of cases by the real cuDNN, in a process of its own."""
    cudnn = pytest.importorskip("cudnn")
    try:
        version = cudnn.backend_version()
    except RuntimeError:
        pytest.skip("the cuDNN frontend is installed without cuDNN")
    if version < 92800:
        pytest.skip("how a device is described to it is known of cuDNN 9.28")

    def run(cases):
        folder = tmp_path_factory.mktemp("planning")
        command = [sys.executable, "-m", "tests.cudnn_planning", str(folder)]
        subprocess.run(command, input=json.dumps(cases), text=True, check=True, cwd=Path(__file__).parent.parent)
        return json.loads((folder / "results.json").read_text())

    return run


@pytest.mark.slow
def test_cudnn_plans_all_that_is_asked_of_it_and_nothing_that_is_not(planned):
    rng = random.Random(7)
    cases = [drawn(rng) for _ in range(60)]
    for case, result in zip(cases, planned(cases), strict=True):
        assert ("engine" in result["cudnn"]) == (not result["ours"]), (case, result)
        assert ("engine" in result["paper"]) == ("engine" in result["cudnn"]), (case, result)


@pytest.mark.slow
def test_the_deterministic_backward_pass_stores_what_is_said(planned):
    case = {
        "dtype": "bfloat16",
        "shape": (1, 4096, 4096, 1, 1, 128, 128),
        "band": (0, 1, 1, 0, None),
        "room": 0,
        "backward": True,
    }
    scores = 4096 * 4096 * 2
    cases = [case | {"arch": arch, "most_scores": most} for arch in ARCHS for most in (scores, scores - 1)]
    found = dict(zip([(one["arch"], one["most_scores"]) for one in cases], planned(cases), strict=True))
    for arch in (80, 89, 90, 120):
        assert scores < found[arch, scores]["cudnn"]["workspace"] < 1.1 * scores
    for arch in (90, 100):
        assert found[arch, scores - 1]["cudnn"]["workspace"] < 0.2 * scores
    for arch in (80, 89, 120):
        assert f"would store {scores} bytes" in found[arch, scores - 1]["ours"][0]
