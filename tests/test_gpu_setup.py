"""benchmarks/gpu_setup.py without a network: ringsim by links, data of wheels, and what of Intel's MPI is packed."""

import subprocess
import sys
import tarfile
import zipfile

import gpu_setup
import pytest


def wheel(path, files):
    with zipfile.ZipFile(path, "w") as made:
        for name, content in files.items():
            made.writestr(name, content)
    return path


def test_ringsim_by_links_is_the_repository(tmp_path):
    gpu_setup.link_package(tmp_path)
    gpu_setup.link_package(tmp_path)
    code = "import ringsim.backends.cuda_sources as s; import ringsim.topologies; print(s.__file__); print(len(s.kernels()) > 40)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
    )
    assert done.stdout.splitlines() == [str(tmp_path / "ringsim/backends/cuda_sources.py"), "True"]


def test_data_of_a_wheel_and_its_programs(tmp_path):
    made = wheel(
        tmp_path / "mpich-1.whl", {"mpich-1.data/data/bin/mpiexec": "x", "mpich-1.data/data/lib/libmpi.so": "y", "RECORD": ""}
    )
    gpu_setup.unpack_data(made, tmp_path / "mpich")
    assert (tmp_path / "mpich/bin/mpiexec").stat().st_mode & 0o111
    assert sorted(path.name for path in (tmp_path / "mpich").rglob("*") if path.is_file()) == ["libmpi.so", "mpiexec"]


def test_what_is_kept_of_intels_mpi(tmp_path):
    files = {f"impi_rt-1.data/data/{folder}/{name}": name for folder, names in gpu_setup.KEPT.items() for name in names}
    gpu_setup.pack_intel(wheel(tmp_path / "a.whl", files | {"impi_rt-1.data/data/bin/IMB-MT": "left"}), tmp_path / "impi.tar.gz")
    with tarfile.open(tmp_path / "impi.tar.gz") as archive:
        modes = {member.name: member.mode for member in archive if member.isfile()}
    assert set(modes) == {f"impi/{folder}/{name}" for folder, names in gpu_setup.KEPT.items() for name in names}
    assert modes["impi/bin/mpiexec.hydra"] == 0o755
    with pytest.raises(KeyError, match="mpiexec"):
        gpu_setup.pack_intel(wheel(tmp_path / "b.whl", {"x": ""}), tmp_path / "c.tar.gz")


def test_exports(tmp_path):
    assert gpu_setup.exports(tmp_path) == [f"export PYTHONPATH={tmp_path}"]
    for name in ("mpich", "impi"):
        (tmp_path / name).mkdir()
    words = [line.partition("=")[0] for line in gpu_setup.exports(tmp_path)]
    assert words == ["export PYTHONPATH", "export MPICH", "export INTEL"]
