"""`ringsim calibrate --backend cupy`: what the command makes of an engine on paper GPUs, and what it says without a GPU."""

import pytest
import yaml
from timed_gpu import World, backend_of
from timed_ring import KERNEL, RATE, TRUTH

from ringsim import __version__, device_hops, device_times, topology
from ringsim.calibration import to_yaml
from ringsim.cli import calibrate
from ringsim.engine import Engine
from ringsim.errors import MissingDependency

from .test_cli import invoke


@pytest.fixture
def found(monkeypatch):
    """A function that has two ranks calibrate as the command does, given what makes matrix products on a rank."""
    monkeypatch.setattr(device_times, "ROWS", (512, 2048))
    monkeypatch.setattr(device_times, "MATRIX_ROWS", (1024,))
    monkeypatch.setattr(device_hops, "SAMPLES", 2)

    def run(endpoint):
        calls, make_backend = backend_of(endpoint, RATE)
        said = []
        engine = Engine(
            backend=make_backend(), transport=endpoint, control=endpoint, said="transport paper: why not", facts=calls.facts()
        )
        values = calibrate._of_gpus(engine, [KERNEL], said.append)
        return values, said

    def of(matmul):
        monkeypatch.setattr("ringsim.backends.cuda_matmul.matmul_by_cublas", matmul)
        return World(topology.parse(TRUTH), 2).run(run)

    return of


def test_the_command_writes_what_its_engine_finds(found):
    def missing():
        raise MissingDependency("matrix products need cuBLAS: pip install nvidia-cublas")

    (values, said), _ = found(missing)
    text = to_yaml(values)
    assert yaml.safe_load(text) == values
    made = topology.parse(text)
    assert made.transport_name == "paper"
    notes = values["notes"]
    assert (notes["ringsim"], notes["backend"], notes["transport_chosen"]) == (__version__, "cupy", "transport paper: why not")
    assert notes["matmul"] == "matrix products need cuBLAS: pip install nvidia-cublas"
    assert "matmul" not in next(iter(values["devices"].values()))
    assert len(said) == 4


def test_without_a_gpu_the_command_says_what_is_missing(capsys, tmp_path):
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.is_available():
        pytest.skip("there is a GPU")
    code, out, err = invoke(capsys, "calibrate", "--backend", "cupy", "-o", tmp_path / "here.yaml")
    assert (code, out) == (2, "")
    assert "backend 'cupy' needs an NVIDIA GPU" in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "here.yaml").exists()
