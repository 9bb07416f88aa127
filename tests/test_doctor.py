"""What the doctor says of recorded machines, one rank at a time: what is wrong, and what to do."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ringsim.backends.loopback import World
from ringsim.doctor import Ran, body, cpus, examine, flavours, gpu, head, tail
from ringsim.doctor.finding import LONGEST, Finding, Probe, attempt, line

from .recorded import (
    CRAY_LIBRARY,
    HUNG,
    HYDRA,
    INTEL,
    LAPTOP,
    MISMATCH,
    MPICH_LIBRARY,
    OPEN_MPI,
    OPEN_MPI_LIBRARY,
    Recorded,
    cuda,
    dgx,
    failed,
    library,
    rows,
    with_smi,
)


def alone(system, *, launched=False, trouble=""):
    """The report of one rank."""
    return examine(system, World(1).endpoint(0), launched=launched, trouble=trouble, progress=str)


def of(report, name):
    """The lines of a name."""
    return [line for line in report.lines if line.name == name]


def the(report, name):
    (found,) = of(report, name)
    return found


def printed(report):
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        for part in (head(report), body(report.lines), tail(report)):
            console.print(part)
    return capture.get()


FAULTS = {
    "no answer": HUNG,
    "no devices": failed("No devices were found\n", 6),
    "mismatch": failed(MISMATCH, 18),
    "no driver": failed("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure ...\n", 9),
    "crashed": failed("", -11),
    "cut off": rows(2)[:-30],
    "garbage": "\x1b[31m\x00\udcff[bold]%s ,,,\n" * 3,
    "empty name": "0, , , , , , , , , , , \n",
    "huge": "x" * 10**6,
}
MACHINES = {name: with_smi(said) for name, said in FAULTS.items()} | {
    "laptop": LAPTOP,
    "dgx": dgx(),
    "nothing": Recorded(cores=None),
}


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_gets_a_whole_report_and_a_remedy_for_what_is_not_ok(name):
    report = alone(MACHINES[name])
    assert [line for line in report.lines if line.status != "ok" and not line.remedy] == []
    assert [line for line in report.lines if "the probe failed" in line.fact] == []
    text = printed(report)
    assert "ringsim would use: backend numpy, transport loopback, threads 1" in text
    assert text.isprintable() or set(text) - {"\n"} == {letter for letter in text if letter.isprintable()}
    assert json.loads(json.dumps(report.to_dict()))["status"] == report.status


def test_a_laptop_without_anything_has_nothing_wrong():
    report = alone(LAPTOP)
    assert report.status == "note"
    assert the(report, "mpi4py").status == "note"
    assert the(report, "GPUs").fact.startswith("none")
    assert "--threads 4 would use the 4 processors" in printed(report)
    assert not report.ready


@pytest.mark.parametrize(
    ("name", "status", "said", "remedy"),
    [
        ("no answer", "wrong", "no answer within 20 s", "by hand"),
        ("no devices", "note", "No devices were found", "scheduler"),
        ("mismatch", "wrong", "Driver/library version mismatch", "reboot"),
        ("no driver", "wrong", "couldn't communicate", "modprobe nvidia"),
        ("crashed", "wrong", "ended by signal 11", "by hand"),
        ("cut off", "wrong", "columns were asked for", "by hand"),
        ("garbage", "wrong", "columns were asked for", "by hand"),
        ("huge", "wrong", "columns were asked for", "by hand"),
    ],
)
def test_a_faulty_nvidia_smi_is_told_in_its_own_words(name, status, said, remedy):
    found = the(alone(MACHINES[name]), "GPUs")
    assert (found.status, len(found.fact) <= LONGEST + 3) == (status, True)
    assert said in found.fact and remedy in found.remedy


def test_a_healthy_node_is_all_good_but_for_what_ranks_do():
    report = alone(dgx())
    assert [line for line in report.lines if line.status == "wrong"] == []
    facts = {line.name: line.fact for line in report.lines}
    assert facts["GPUs"] == "8 x NVIDIA H100 80GB HBM3, 81559 MiB, compute capability 9.0"
    assert facts["driver"] == "580.126.20"
    assert facts["links"] == "NV18 between all 8 GPUs"
    assert facts["peer access"].startswith("between all 8")
    assert facts["adapters"] == "10 x 400 Gb/sec (4X NDR) InfiniBand"
    assert facts["near GPUs"].startswith("each GPU has")
    assert (facts["NCCL"], facts["cuDNN"]) == ("2.29.7", "9.13.0")
    assert facts["library"] == "MPICH 5.0.2 at /opt/mpi/lib/libmpi.so.12"
    assert facts["GPU"] == "the rank runs on the NUMA node of its GPU"


@pytest.mark.parametrize(
    ("text", "name"), [(HYDRA, "MPICH 5.0.2"), (OPEN_MPI, "Open MPI 5.0.11"), (INTEL, "Intel MPI 2021.17"), ("srun?", "None")]
)
def test_launchers_are_known_by_what_they_say(text, name):
    assert str(flavours.of_launcher(text)) == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (MPICH_LIBRARY, "MPICH 5.0.2"),
        (OPEN_MPI_LIBRARY, "Open MPI 5.0.11"),
        (CRAY_LIBRARY, "Cray MPICH 8.1.25.17"),
        ("Intel(R) MPI Library 2021.11 for Linux* OS\n", "Intel MPI 2021.11"),
    ],
)
def test_libraries_are_known_by_what_they_say(text, name):
    assert str(flavours.of_library(text)) == name
    assert flavours.of_launcher("mpiexec version 1.8.0 revision") == ("PALS", "1.8.0")
    assert flavours.of_launcher("slurm 23.02.7") == ("Slurm", "23.02.7")


@pytest.mark.parametrize(
    ("launcher", "text", "status"),
    [
        (OPEN_MPI, MPICH_LIBRARY, "wrong"),
        (HYDRA, OPEN_MPI_LIBRARY, "wrong"),
        (INTEL, MPICH_LIBRARY, "note"),
        (HYDRA, CRAY_LIBRARY, "note"),
        (HYDRA.replace("5.0.2", "4.1.1"), MPICH_LIBRARY, "note"),
        (HYDRA, MPICH_LIBRARY, "ok"),
        (OPEN_MPI, OPEN_MPI_LIBRARY, "ok"),
        ("What is this?", MPICH_LIBRARY, "note"),
        (failed("", 127, stderr="libhwloc.so.5: cannot open shared object file"), MPICH_LIBRARY, "note"),
    ],
)
def test_a_launcher_that_is_not_the_library_s_own(launcher, text, status):
    system = replace(LAPTOP, commands={"mpiexec": launcher}, answers={"mpi_library": library(text)})
    assert the(alone(system), "mpiexec").status == status


def test_a_rank_on_the_wrong_socket_is_told_which_processors_are_right():
    bad = alone(dgx(cores=tuple(range(56, 112))))
    found = the(bad, "GPU")
    assert (found.status, bad.status) == ("wrong", "wrong")
    assert "56-111" in found.fact and "numactl --cpunodebind=0 --membind=0" in found.remedy
    wide = the(alone(dgx(cores=tuple(range(224))), launched=True), "GPU")
    assert (wide.status, "112 of its 224 processors are far" in wide.fact) == ("note", True)


@pytest.mark.parametrize(
    ("variable", "value", "status"),
    [
        ("MPICH_ASYNC_PROGRESS", "1", "wrong"),
        ("I_MPI_ASYNC_PROGRESS", "yes", "wrong"),
        ("OMPI_MCA_btl_tcp_progress_thread", "1", "wrong"),
        ("MPICH_ASYNC_PROGRESS", "0", None),
        ("CUDA_LAUNCH_BLOCKING", "1", "wrong"),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "1", "note"),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "8", None),
        ("NCCL_P2P_DISABLE", "1", "note"),
    ],
)
def test_variables_that_do_harm_are_named_with_what_they_do(variable, value, status):
    found = of(alone(dgx(environment={variable: value})), variable)
    assert [line.status for line in found] == ([status] if status else [])
    if status:
        assert f"{variable}={value}" in found[0].fact and f"unset {variable}" in found[0].remedy


def test_gpu_support_of_cray_mpich_wants_its_gtl():
    asked = {"MPICH_GPU_SUPPORT_ENABLED": "1"}
    without = replace(dgx(environment=asked), answers={"mpi_library": library(CRAY_LIBRARY)})
    assert the(alone(without), "GTL").status == "wrong"
    linked = replace(without, answers={"mpi_library": library(CRAY_LIBRARY, "/opt/cray/lib/libmpi_gtl_cuda.so.0")})
    assert the(alone(linked), "GTL").status == "ok"


@pytest.mark.parametrize(
    ("facts", "name", "status", "said"),
    [
        (
            cuda(0, driver=12040, failed={"devices": "CUDARuntimeError: cudaErrorInsufficientDriver"}),
            "driver for CUDA",
            "wrong",
            "12.4",
        ),
        (cuda(0, failed={"devices": "CUDARuntimeError: cudaErrorNoDevice"}), "driver for CUDA", "wrong", "sees none"),
        (cuda(cudnn=None, failed={"cudnn": "ModuleNotFoundError: cudnn"}), "cuDNN", "note", "ringsim's own kernels"),
        (cuda(nvrtc=None, failed={"nvrtc": "RuntimeError: libnvrtc"}), "NVRTC", "wrong", "nothing compiles"),
        (
            cuda(headers=None, failed={"headers": "FileNotFoundError: no toolkit"}),
            "CUDA headers",
            "wrong",
            "no toolkit: nothing compiles",
        ),
        (cuda(peers=[[True, False], [False, True]]), "peer access", "note", "not between GPUs 0-1"),
        (HUNG, "CuPy", "wrong", "no answer within 20 s"),
        (failed("", -6, stderr="terminate called"), "CuPy", "wrong", "terminate called"),
    ],
)
def test_what_is_wrong_with_cuda(facts, name, status, said):
    found = the(alone(replace(dgx(), answers={"cuda_library": facts})), name)
    assert (found.status, said in found.fact) == (status, True)


def test_a_library_that_does_not_answer_is_asked_by_hand():
    slow = alone(replace(LAPTOP, answers={"cuda_library": HUNG, "mpi_library": failed("", -11)}))
    assert (the(slow, "CuPy").status, "--timeout 120" in the(slow, "CuPy").remedy) == ("note", True)
    assert (the(slow, "mpi4py").status, "signal 11" in the(slow, "mpi4py").fact) == ("wrong", True)


def test_the_extra_that_is_advised_fits_the_driver():
    for driver, extra in (("580.126.20", "gpu-cuda13"), ("550.54.15", "gpu-cuda12")):
        system = replace(dgx(driver=driver), answers={}, distributions={})
        assert extra in the(alone(system), "CuPy").remedy
    both = replace(dgx(), distributions={"cupy-cuda12x": "14.2.0", "cupy-cuda13x": "14.2.0"})
    assert the(alone(both), "CuPy packages").status == "wrong"


def test_an_old_nvidia_smi_is_asked_without_the_columns_that_it_does_not_know():
    asked = []

    class Old:
        def which(self, name):
            return f"/usr/bin/{name}"

        def run(self, *command):
            fields = command[1].removeprefix("--query-gpu=").split(",")
            asked.append(fields)
            if "compute_cap" in fields:
                return failed('Field "compute_cap" is not a valid field to query.\n', 2)
            return Ran(command=command, rc=0, stdout=", ".join("0" if field == "index" else "x" for field in fields) + "\n")

    seen = gpu.see(Old())
    assert len(asked) == 2 and seen.gpus[0]["compute_cap"] == "unknown"


def test_a_probe_that_raises_is_a_finding_and_the_others_still_speak():
    def broken(system):
        raise KeyError("driver")

    def closed(system):
        raise PermissionError(13, "Permission denied", "/sys/class/infiniband")

    (fault,) = attempt(Probe("gpu", "GPUs", broken), LAPTOP)
    assert (fault.status, fault.fact) == ("wrong", "the probe failed: KeyError: 'driver'")
    (note,) = attempt(Probe("network", "adapters", closed), LAPTOP)
    assert note.status == "note" and "/sys/class/infiniband" in note.fact


@given(st.text(), st.text(max_size=3000))
def test_what_is_said_is_one_printable_line(text, long):
    finding = Finding(subject="gpu", name="GPUs", fact=text + long, remedy=long)
    assert finding.fact.isprintable() and finding.remedy.isprintable()
    assert len(finding.fact) <= LONGEST + 3
    assert line(line(text)) == line(text)


@given(st.sets(st.integers(0, 1000)))
def test_sets_of_processors_read_back(numbers):
    text = cpus.shown(numbers)
    assert cpus.parse(text) == numbers if numbers else text == "none"


@given(st.text(alphabet="0123456789,-²x "))
def test_no_text_is_too_odd_for_a_set_of_processors(text):
    assert all(isinstance(number, int) for number in cpus.parse(text))


@given(st.text(max_size=300))
def test_whatever_nvidia_smi_writes_there_is_a_report(text):
    assert of(alone(with_smi(text)), "GPUs")


def test_visible_devices_are_counted_as_cuda_counts_them():
    gpus = gpu.see(dgx()).gpus
    numbers = {"0,2": [0, 2], "3": [3], "": [], "-1": [], "1,9,0": [1], gpus[5].uuid: [5], "2,2": [2], "GPU-": []}
    assert {text: [one.index for one in gpu.visible(gpus, text)] for text in numbers} == numbers
    assert gpu.visible(gpus, None) == gpus
    assert the(alone(dgx(environment={"CUDA_VISIBLE_DEVICES": "-1"})), "GPU").status == "wrong"
