"""nvidia-smi as it answers, and as it does not."""

import pytest

from ringsim.backends.cuda_clocks import clocks_of

BUS = "0000:18:00.0"
CLOCKS = {"driver_version": "580.159.04", "sm_mhz": 1980, "memory_mhz": 3201, "most_sm_mhz": 1980}


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ('echo "1980, 3201, 1980, 580.159.04"', CLOCKS),
        ('echo "345, [N/A], 1980, 580.159.04"', {"unknown": "nvidia-smi (exit 0): '345, [N/A], 1980, 580.159.04'"}),
        ("echo", {"unknown": "nvidia-smi (exit 0): ''"}),
        ('echo "No devices were found"; exit 6', {"unknown": "nvidia-smi (exit 6): 'No devices were found'"}),
        ('echo "Failed to initialize NVML" >&2; exit 255', {"unknown": "nvidia-smi (exit 255): 'Failed to initialize NVML'"}),
    ],
)
def test_clocks(script, found, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f'#!/bin/sh\ntest "$3" = --id={BUS} || exit 9\n{script}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert clocks_of(BUS) == found


def test_no_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "FileNotFoundError" in clocks_of(BUS)["unknown"]
