"""Files from strangers: each is imported to something usable, or refused with one message; and the command around it."""

import random
import re
import subprocess
import sys
import time

import pytest

from ringsim import importing
from ringsim.errors import TopologyError
from ringsim.importing import reading, safe_xml

from .test_cli import invoke
from .test_importing import ALL, DATA, NVLINK

TEXTS = {name: (DATA / name).read_text() for name in ALL}
NCCL, HWLOC, SMI = TEXTS["nccl-mesh.xml"], TEXTS["hwloc-v2-nvswitch.xml"], TEXTS["smi-hybrid.txt"]
LAUGHS = '<!DOCTYPE system [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>\n<system version="1">&b;</system>'
OUTSIDE = '<!DOCTYPE system [<!ENTITY a SYSTEM "file:///etc/passwd">]>\n<system version="1">&a;</system>'


def refusal(text, **options):
    began = time.perf_counter()
    with pytest.raises(TopologyError) as caught:
        importing.parse(text, "x.xml", **options)
    assert time.perf_counter() - began < 10
    assert str(caught.value).startswith("x.xml:")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "a DOCTYPE with declarations of its own is not read"),
        (OUTSIDE, "a DOCTYPE with declarations of its own is not read"),
        (HWLOC.replace('value="node-17', 'value="&secret;node-17'), r"x\.xml:\d+: entity '&secret;"),
        (NCCL.replace('version="1"', 'version="&secret;"'), "no XML: undefined entity"),
        ("<a>" * 10**6, "nested too deeply; at most 128 levels"),
        ("<system version='1'>" + "<cpu/>" * 300_000, "more than 200000 elements"),
        ("<system " + " ".join(f'a{number}="1"' for number in range(10**5)) + "/>", "attributes; at most 64"),
        (f'<system version="{"1" * 10**6}"/>', "longer than 65536 characters"),
        ("<html></html>", "no known format: <system> is NCCL's"),
        ("", "no matrix"),
        (NCCL[:1500], r"x\.xml:\d+: no XML: (no element found|unclosed token)"),
        (NCCL.replace('version="1"', 'version="7"'), "version '7' of NCCL's format is not known"),
        (NCCL.replace(' busid="0000:1a:00.0"', ""), r"x\.xml:\d+: <pci>: attribute 'busid' is missing"),
        (NCCL.replace("0000:3e:00.0", "0000:3d:00.0"), "busid 0000:3d:00.0 is there twice; first on line"),
        (NCCL.replace("0000:3e:00.0", "here"), "busid='here' is no PCI address"),
        (NCCL.replace('count="2"', 'count="-2"'), "count='-2' is no whole number from 1 to 1024"),
        (NCCL.replace('count="2"', 'count="1e9"'), "count='1e9' is no whole number"),
        (NCCL.replace('count="2"', 'count="99999"'), "count='99999' is no whole number"),
        (
            NCCL.replace('target="0000:1c:00.0" count="2"', 'target="0000:1a:00.0" count="2"'),
            "has 2 links to .*, which has 0 back",
        ),
        (f"<{'a' * 10**6}/>", "x.xml:1: <a{32}>: no known format"),
        (NCCL.replace('count="2"', 'count="3"', 1), "has 3 links to 0000:1c:00.0, which has 2 back"),
        (NCCL.replace('speed="10000"', 'speed="inf"'), "speed='inf' is no whole number"),
        (NCCL.replace('link_speed="5 GT/s"', 'link_speed="nan GT/s"'), "link_speed='nan GT/s' is no PCIe speed"),
        (NCCL.replace('link_speed="5 GT/s"', 'link_speed="0 GT/s"'), "link_speed='0 GT/s' is no PCIe speed"),
        (NCCL.replace('link_width="8"', 'link_width="1000000"'), "link_width='1000000' is no whole number from 1 to 64"),
        (NCCL.replace('numaid="1"', 'numaid="0"'), "numaid '0' is there twice"),
        (NCCL.replace('numaid="1"', 'numaid="1" host_hash="0x7"'), "2 hosts"),
        (NCCL.replace('rank="2"', 'rank="3"'), "two GPUs have the number 3"),
        (NCCL.replace('rank="2"', 'rank="-1"'), "rank='-1' is no whole number"),
        (re.sub(r"<gpu.*?</gpu>", "", NCCL, flags=re.S).replace("0x030200", "0x010000"), "no GPU in it"),
        (NCCL.replace("<gpu ", "<gpu/><gpu "), "several GPUs in one PCI device"),
        (
            HWLOC.replace('version="2.0"', ""),
            "hwloc's format of version 1 is not read: write the file with lstopo of hwloc 2 or 3",
        ),
        (HWLOC.replace('version="2.0"', 'version="4.0"'), "hwloc's format of version '4.0' is not read"),
        (HWLOC.replace('type="Machine"', 'type="System"'), "one object of type Machine"),
        (HWLOC.replace("63.015385", "-1"), "pci_link_speed='-1' is no number of GB/s"),
        (HWLOC.replace("63.015385", "inf"), "pci_link_speed='inf' is no number"),
        (HWLOC.replace("83230720", "many"), "CUDAGlobalMemorySize='many' is no number of KiB"),
        (HWLOC.replace("0000:14:00.0", "0000:13:00.0"), "pci_busid '0000:13:00.0' is there twice; first on line 14"),
        (HWLOC.replace("0000:14:00.0", "slot 7"), "pci_busid='slot 7' is no PCI address"),
        (HWLOC.replace("225000", "225", 1), "MB/s, and back"),
        (HWLOC.replace("225000", "225e3", 1), "'225e3' is no whole number below"),
        (HWLOC.replace("225000", "", 1), "6 objects need 6 indexes and 36 values, found 6 and 35"),
        (HWLOC.replace('nbobjs="6"', 'nbobjs="1000000000"'), "nbobjs='1000000000' is no whole number from 1 to 1024"),
        (SMI.replace("NV2", "NV0", 1), r"x\.xml:2: GPU0 to GPU3 is 'NV0'; allowed: X on the diagonal"),
        (SMI.replace("NV2", "NV99999"), "is 'NV99999'; allowed"),
        (SMI.replace("NV2", "NV1", 1), r"x\.xml:5: GPU3 to GPU0 is NV2, and GPU0 to GPU3 NV1"),
        (SMI.replace("\tGPU7", "", 1), "no row for column mlx5_0: a file cut off, or columns run together"),
        (SMI.replace("\nGPU7", "\nGPU9", 1), "no row for column GPU7"),
        (SMI.replace("GPU1", "GPU0"), "the columns are 1 to 256 different names"),
        (re.sub(r"(GPU0\t.*\n)", r"\1\1", SMI[SMI.index("\n") :]), "no matrix"),
        (SMI[:300], "no row for column|cells for 12 columns"),
    ],
)
def test_a_hostile_file_is_refused_in_bounded_time(text, message):
    assert re.search(message, refusal(text))


def test_a_matrix_that_is_no_tree_is_refused():
    text = "GPU0 GPU1 GPU2\nGPU0 X PIX SYS\nGPU1 PIX X PIX\nGPU2 SYS PIX X\n"
    assert "GPU0 and GPU2 are SYS apart, and what is between them is PIX or nearer to both" in refusal(text)


@pytest.mark.parametrize("gpus", [250, 300])
def test_enormous_matrices_are_refused(gpus):
    names = [f"GPU{number}" for number in range(gpus)]
    rows = [" ".join([one, *("X" if one == other else "SYS" for other in names)]) for one in names]
    assert re.search("more than 128 GPUs|1 to 256 different names", refusal("\n".join([" ".join(names), *rows])))


def test_limits_hold_for_every_kind_of_part():
    cpus = "".join(f'<cpu numaid="{n}"><pci busid="{n:04x}:01:00.0" class="0x030200"/></cpu>' for n in range(100))
    assert "more than 64 root complexes" in refusal(f'<system version="1">{cpus}</system>')
    nics = "".join(f'<nic><net name="n{n}" dev="{n}"/></nic>' for n in range(2000))
    assert "more than 1024 GPUs, NICs" in refusal(f'<system version="1"><cpu numaid="0">{nics}</cpu></system>')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x7fELF\x00\x00\xff\xfe", "not UTF-8 at byte"),
        (NCCL.encode("utf-16"), "not UTF-8 at byte 0"),
        (b"\x00" * 100, "not a text file: it has NUL"),
        (b"GPU0\xff", "not UTF-8 at byte 4"),
        (b" " * (reading.MOST_BYTES + 1), "larger than 16777216 bytes"),
    ],
)
def test_bytes_that_are_no_text_are_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(TopologyError, match=message):
        importing.read(path)


def test_what_real_files_have_is_read():
    made = importing.parse("\ufeff".lstrip("\ufeff") + NCCL.replace("\n", "\r\n"), "crlf.xml")
    assert len(made.unknown) == 14
    assert (
        safe_xml.parse('<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE topology SYSTEM "hwloc2.dtd">\n<topology/>', "x").line
        == 3
    )
    # an idle or virtual machine has no width; a dump of some GPUs has links to others; a VM hides its NVSwitches
    text = NCCL.replace('link_width="8"', 'link_width="0"').replace("0000:1c:00.0", "0000:1f:00.0", 1)
    text = text.replace(
        '<nvlink target="0000:1f:00.0" count="2" tclass="0x030200"/>',
        '<nvlink target="0000:99:00.0" count="2" tclass="0x030200"/>',
    )
    text = re.sub(r'\s*<nvlink target="0000:1a:00.0" count="2" tclass="0x030200"/>', "", text)
    made = importing.parse(text, "part.xml")
    assert "links.pcie-uplink.bandwidth" in made.unknown
    assert "left out: links to GPUs that are not in the file: 0000:1a:00.0 to 0000:99:00.0" in made.notes
    bare = '<system version="1"><cpu numaid="0"><pci busid="ffff:ff:01.0" class="0x060400" link_speed="2.5 GT/s" link_width="1">'
    bare += '<pci busid="0003:00:00.0" class="0x030200"/><pci busid="0103:00:00.0" class="0x020700"/></pci></cpu></system>'
    made = importing.parse(bare, "vm.xml")
    assert made.notes == (
        "the file has no NVLink or XGMI: the GPUs have none, or NCCL was to find them by itself",
        "2.5 GT/s, as a virtual machine's bridges and devices have: ffff:ff:01.0",
    )
    assert "nic-0103_00_00: nic" in made.text
    hidden = re.sub(r'target="0000:c\d:00.0" count="2"', 'target="fffffff:ffff:ff" count="12"', TEXTS["nccl-nvswitch.xml"])
    hidden = re.sub(r"(\s*<nvlink [^>]*>)+", r"\1", hidden)
    assert importing.parse(hidden, "vm.xml").text.count("also: [{join: switch, link: nvlink}]") == 1
    bare = "\n".join("         " + line.replace("\t", "   ") for line in SMI.splitlines())
    assert importing.parse(f"Sat Nov 21\n$ nvidia-smi topo -m\n{bare}", "x").found == importing.parse(SMI, "x").found


JUNK = [
    "",
    " ",
    "\t",
    "-1",
    "0",
    "1",
    "99999999999999999999",
    "inf",
    "nan",
    "1e9",
    '"',
    "<",
    ">",
    "&",
    "é",
    "\x85",
    "\u2028",
    "\ud7ff",
    "X",
    "NV4",
    "PIX",
]


def mutated(text, rng):
    """A text cut, or with lines or letters lost, doubled, moved or changed."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        lines = text.split("\n")
        row, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        begin = rng.randrange(len(text) + 1)
        end = min(len(text), begin + rng.randint(1, 8))
        text = rng.choice(
            [
                text[:begin],
                text[:begin] + text[end:],
                text[:begin] + rng.choice(JUNK) + text[end:],
                text[:begin] + chr(rng.randrange(1, 0xD7FF)) + text[begin + 1 :],
                text[:begin] + text[begin:end] + text[begin:],
                re.sub(r"\d+", lambda found: rng.choice([found[0], found[0], found[0], rng.choice(JUNK)]), text),
                "\n".join(lines[:row] + lines[row + 1 :]),
                "\n".join([*lines[:row], lines[other], *lines[row:]]),
                "\n".join([*lines[:row], lines[other], *lines[row + 1 :]]),
            ]
        )
    return text


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_file_is_refused_or_makes_a_usable_machine(name, seed):
    rng = random.Random(f"{name} {seed}")
    used = 0
    for _ in range(25):
        text = mutated(TEXTS[name], rng)
        try:
            made = importing.parse(text, name, nvlink=NVLINK.get(name))
        except TopologyError as error:
            assert re.match(re.escape(name) + r"(:\d+)?: \S", str(error)), error
            continue
        used += 1
        machine = reading.filled(made.text)
        assert len(machine.slots) >= 1
        assert "\n" not in "".join(made.notes)
    assert used <= 25


def test_the_command_writes_yaml_to_the_terminal_and_what_it_found_beside_it(capsys):
    code, out, err = invoke(capsys, "topologies", "import", DATA / "nccl-nvswitch.xml", "--name", "mine")
    assert code == 0
    assert len(reading.filled(out).devices) == 8
    assert 'name: "mine"' in out
    assert "8 figures are unknown; write them in the file" in err
    assert re.search(r"^  links\.nvlink\.bandwidth$", err, re.MULTILINE)
    assert re.search(r"^link pcie +20 +31\.5077 GB/s", err, re.MULTILINE)


def test_an_imported_file_is_checked_finished_and_shown(capsys, tmp_path):
    target = tmp_path / "box.yaml"
    code, out, _ = invoke(capsys, "topologies", "import", DATA / "smi-mesh.txt", "--nvlink", "mesh", "-o", target)
    assert (code, out) == (0, f"wrote {target}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["box.yaml"]
    code, out, err = invoke(capsys, "topologies", "check", target)
    assert code == 2
    assert f"{target}:10: 4 figures are unknown:\n  devices.gpu.memory_bandwidth   ({target}:10)\n" in err
    settings = ("nvlink.bandwidth=100GB/s", "nvlink.latency=1us")
    done = [part for setting in settings for part in ("--set", f"links.{setting}")]
    done += ["--set", "devices.gpu.memory_bandwidth=2TB/s", "--set", "transports.mpi.progress=offload"]
    code, out, err = invoke(capsys, "topologies", "show", target, *done, "--route", "0:3")
    assert (code, err) == (0, "")
    assert "a large message alone is bound by gpu-0 > gpu-3" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.xml"], "nowhere.xml: cannot be read: No such file or directory"),
        ([DATA], "cannot be read: Is a directory"),
        ([DATA / "smi-mesh.txt"], "say --nvlink switch or --nvlink mesh"),
        ([DATA / "nccl-mesh.xml", "--format", "hwloc"], "not hwloc, but nccl"),
        ([DATA / "nccl-mesh.xml", "--format", "nvidia-smi"], "not nvidia-smi, but nccl"),
        ([DATA / "smi-pcie.txt", "--format", "nccl"], "not nccl, but no XML"),
        ([DATA / "smi-pcie.txt", "--format", "lstopo"], "'lstopo' is not one of"),
        ([DATA / "smi-mesh.txt", "--nvlink", "ring"], "'ring' is not one of"),
        ([DATA / "smi-pcie.txt", "--nics", "mlx5_7"], "no NIC 'mlx5_7'; the file has mlx5_0, mlx5_1"),
        ([DATA / "smi-pcie.txt", "-o", "no/such/box.yaml"], "folder no/such does not exist"),
        ([DATA / "smi-pcie.txt", "-o", DATA / "smi-pcie.txt"], "-o names the file that is imported"),
        ([DATA / "smi-pcie.txt", "--output-file", "x"], "No such option"),
        ([], "Missing argument 'FILE'"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(capsys, arguments, message):
    code, out, err = invoke(capsys, "topologies", "import", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("ringsim: ")
    assert message in err
    assert "Traceback" not in err


def test_standard_input_is_read_and_a_bomb_is_refused_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "ringsim", "topologies", "import", "-"]
    done = subprocess.run(command, input=NCCL, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("# stdin (NCCL topology dump)")
    done = subprocess.run(command, input=LAUGHS, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ringsim: stdin:1: a DOCTYPE with declarations")
