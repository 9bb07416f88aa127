"""Where output goes: files whole or not at all, links followed, pipes left alone; a reader that goes, a disk that is full."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ringsim import files

COMMAND = [sys.executable, "-m", "ringsim"]


def run(tmp_path, text, **streams):
    return subprocess.run(
        ["bash", "-c", f"{' '.join(COMMAND)} {text}"],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        **streams,
    )


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text("old")
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["facts.json"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(tmp_path, exists):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    if exists:
        target.write_text("old")
    link.symlink_to(target)
    files.check_writable(link)
    files.write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_link_to_itself_is_one_message(tmp_path):
    link = tmp_path / "loop"
    link.symlink_to(link)
    with pytest.raises(files.FileError, match="a link that leads nowhere"):
        files.write_text(link, "new")


def test_a_pipe_stays_a_pipe(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    files.check_writable(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    files.write_text(pipe, "facts")
    reader.join(timeout=30)
    assert found == ["facts"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("command", ["topologies schema", "topologies list", "--help"])
def test_a_reader_that_goes_is_no_fault(tmp_path, command):
    done = run(tmp_path, f"{command} | head -1")
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["topologies list", "--version", "simulate ideal --seq 8K --dtype bf16 --head-dim 128"])
def test_a_closed_output_is_no_fault(tmp_path, command):
    done = run(tmp_path, f"{command} >&-")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_cannot_be_said_does_not_change_the_exit_code(tmp_path):
    assert run(tmp_path, "simulate nowhere --seq 8K 2> /dev/full").returncode == 2
    assert run(tmp_path, "simulate nowhere --seq 8K 2>&-").returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["topologies schema", "simulate ideal --seq 8K --dtype bf16 --head-dim 128"])
def test_a_full_disk_is_one_message(tmp_path, command):
    done = run(tmp_path, f"{command} > /dev/full")
    assert done.returncode == 2
    assert done.stderr == "ringsim: standard output: No space left on device\n"
