"""Carries what benchmarks/gpu.py needs to a GPU machine without a network: wheels, MPIs, and ringsim itself.

    python benchmarks/gpu_setup.py fetch wheels              where there is a network; --python 3.12 is that of the GPU machine
    python benchmarks/gpu_setup.py install wheels /tmp/site  on the GPU machine, with its python; prints what to export

`fetch` downloads, for Linux on x86-64, what an image with CuPy, cuDNN, mpi4py, NumPy, PyYAML, click, rich, ml_dtypes and
threadpoolctl lacks (--all: these, too, but for CuPy and cuDNN), with MPICH and Intel MPI, of which only what a run needs is kept.
cuDNN's frontend comes without the compilers of kernels that it asks for: ringsim does not use them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
LACKING: Final = (
    "simpy",
    "pydantic",
    "pydantic-core",
    "annotated-types",
    "typing-inspection",
    "typing-extensions",
    "nvidia-cudnn-frontend",
    "mpich",
)
"""typing-extensions because pydantic-core wants a newer one than images have."""
USUAL: Final = (
    "numpy",
    "ml_dtypes",
    "threadpoolctl",
    "PyYAML",
    "click",
    "rich",
    "pygments",
    "markdown-it-py",
    "mdurl",
    "mpi4py",
)
INTEL: Final = "impi-rt==2021.18.1"
"""The version whose files KEPT names; with these alone four ranks on one host were seen to talk, without a GPU."""
KEPT: Final = {
    "bin": ("mpiexec.hydra", "hydra_bstrap_proxy", "hydra_pmi_proxy"),
    "lib": (
        "libmpi.so.12",
        "libmpi_shm_heap_proxy.so",
        "libfabric.so.1",
        "libshm-fi.so",
        "libtcp-fi.so",
        "librxm-fi.so",
        "mpi/libmpi_ze_hooks.so",
    ),
    "opt/mpi/etc": ("coll.fatbin", "collectives.conf", "pt2pt.conf"),
}
"""Of Intel's 129 MB: what a job on one host loads, kernels for device memory among it; tuning for other hosts is left out."""
PLATFORMS: Final = ("2_28", "2_27", "2_24", "2_17", "2_5")
PACKED: Final = "impi.tar.gz"
MOST_NBYTES: Final = 60 * 2**20


def download(names: tuple[str, ...], folder: Path, python: str) -> None:
    """Wheels of these names, without what they depend on."""
    tags = [f"manylinux_{one}_x86_64" for one in PLATFORMS] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", python]
    command += ["--implementation", "cp", *(word for tag in tags for word in ("--platform", tag)), "--dest", str(folder)]
    subprocess.run([*command, *names], check=True, stdin=subprocess.DEVNULL)


def pack_intel(wheel: Path, target: Path) -> None:
    """What KEPT names of Intel's wheel, as an archive. Raises KeyError where the wheel no longer has it."""
    with zipfile.ZipFile(wheel) as source, tempfile.TemporaryDirectory() as scratch:
        names = {name.partition(".data/data/")[2]: name for name in source.namelist()}
        for folder, files in KEPT.items():
            for file in files:
                made = Path(scratch) / "impi" / folder / file
                made.parent.mkdir(parents=True, exist_ok=True)
                made.write_bytes(source.read(names[f"{folder}/{file}"]))
                made.chmod(0o755 if folder == "bin" else 0o644)
        with tarfile.open(target, "w:gz") as archive:
            archive.add(Path(scratch) / "impi", "impi")


def fetch(folder: Path, python: str, *, everything: bool) -> int:
    """Fill `folder`; the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    download(LACKING + (USUAL if everything else ()), folder, python)
    with tempfile.TemporaryDirectory() as scratch:
        download((INTEL,), Path(scratch), python)
        (wheel,) = Path(scratch).glob("impi_rt-*.whl")
        pack_intel(wheel, folder / PACKED)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    for name, nbytes in sizes.items():
        print(f"{nbytes / 2**20:7.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / 2**20:7.2f} MiB in all")
    return 0 if total <= MOST_NBYTES else 1


def unpack_data(wheel: Path, target: Path) -> None:
    """A wheel's data files, those of bin/ executable."""
    with zipfile.ZipFile(wheel) as source:
        for name in source.namelist():
            _, found, inner = name.partition(".data/data/")
            if found and not name.endswith("/"):
                made = target / inner
                made.parent.mkdir(parents=True, exist_ok=True)
                made.write_bytes(source.read(name))
                made.chmod(0o755 if inner.startswith("bin/") else 0o644)


def link_package(target: Path) -> None:
    """The package `ringsim` in `target`: links to the repository's folders, as setup.cfg puts them together."""
    package = target / "ringsim"
    if package.is_symlink() or package.exists():
        shutil.rmtree(package)
    package.mkdir(parents=True)
    for path in (ROOT / "ringsim").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    for name in ("backends", "topologies"):
        (package / name).symlink_to(ROOT / name)


def install(folder: Path, target: Path) -> int:
    """Wheels, MPI and links into `target`; prints what to export. The exit code."""
    wheels = sorted(str(path) for path in folder.glob("*.whl") if not path.name.startswith("mpich-"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
    subprocess.run([*command, "--target", str(target), *wheels], check=True, stdin=subprocess.DEVNULL)
    for wheel in folder.glob("mpich-*.whl"):
        # pip --target drops what a wheel brings under lib/
        unpack_data(wheel, target / "mpich")
    if (folder / PACKED).exists():
        with tarfile.open(folder / PACKED) as archive:
            archive.extractall(target, filter="data")
    link_package(target)
    for line in exports(target):
        print(line)
    return 0


def exports(target: Path) -> list[str]:
    """Shell lines: where Python finds what, and the launchers as `benchmarks/gpu.py --mpiexec` takes them."""
    impi = target / "impi"
    mpich = f"env MPI4PY_LIBMPI={target}/mpich/lib/libmpi.so.12 {target}/mpich/bin/mpiexec"
    variables = {
        "I_MPI_ROOT": impi,
        "LD_LIBRARY_PATH": f"{impi}/lib:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":"),
        "FI_PROVIDER_PATH": f"{impi}/lib",
        "MPI4PY_LIBMPI": f"{impi}/lib/libmpi.so.12",
        "I_MPI_FABRICS": "shm",
        "I_MPI_PIN": 0,
        "I_MPI_OFFLOAD": 1,
        "I_MPI_OFFLOAD_MODE": "cuda",
    }
    intel = " ".join(["env", *(f"{name}={value}" for name, value in variables.items()), f"{impi}/bin/mpiexec.hydra"])
    found = [f"export PYTHONPATH={target}"]
    if (target / "mpich").exists():
        found.append(f"export MPICH='{mpich}'")
    return [*found, f"export INTEL='{intel}'"] if impi.exists() else found


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("fetch")
    fetching.add_argument("folder", type=Path)
    fetching.add_argument("--python", default="3.12", help="the GPU machine's, such as 3.12")
    fetching.add_argument("--all", action="store_true", help="what such an image usually has, too")
    installing = commands.add_parser("install")
    installing.add_argument("folder", type=Path)
    installing.add_argument("target", type=Path)
    asked = parser.parse_args()
    if asked.command == "fetch":
        return fetch(asked.folder, asked.python, everything=asked.all)
    return install(asked.folder, asked.target.resolve())


if __name__ == "__main__":
    sys.exit(main())
