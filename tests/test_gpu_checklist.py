"""The GPU checklist: every claim names a section, and is shown by a JSON in which that section passed, or is not yet run."""

import json
import re
from pathlib import Path

import gpu
import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "gpu-checklist.md"
NOT_YET = "not yet run"
SHOWN = re.compile(r"(\d{4}-\d{2}-\d{2}), ([^,]+), \[JSON\]\((gpu/[\w.-]+\.json)\)")


def rows(heading):
    """Cells of the table under a heading."""
    part = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def problem(shown, section, folder):
    """What is wrong with a claim's last cell, or None."""
    if shown == NOT_YET:
        return None
    found = SHOWN.fullmatch(shown)
    if found is None:
        return f"{shown!r} is neither {NOT_YET!r} nor `DATE, DEVICE, [JSON](gpu/FILE.json)`"
    date, device, name = found.groups()
    path = folder / name
    if not path.exists():
        return f"{name} does not exist"
    values = json.loads(path.read_text())
    status = values["sections"].get(section, {}).get("status", "missing")
    named = values["sections"].get("facts", {}).get("values", {}).get("device", {}).get("device", device)
    wrong = {
        f"{name} is of {values['started']}": not values["started"].startswith(date),
        f"section {section} of {name} is {status}": status != "passed",
        f"{name} is of {named}, not of {device}": device != named,
    }
    return next((said for said, holds in wrong.items() if holds), None)


@pytest.mark.parametrize("row", rows("With a GPU"), ids=lambda row: row[0][:50])
def test_a_claim_is_shown_or_not_yet_run(row):
    _, said_in, section, shown = row
    assert section in (*gpu.NAMES, "sanitize")
    for page in said_in.split(", "):
        assert (ROOT / page).exists(), page
    assert problem(shown, section, PAGE.parent) is None


def test_every_section_has_its_claims():
    assert {row[2] for row in rows("With a GPU")} == {*gpu.NAMES, "sanitize"} - {"facts"}


@pytest.mark.parametrize("row", rows("Without a GPU, in CI"), ids=lambda row: row[0][:50])
def test_what_ci_shows_has_its_tests(row):
    for path in row[1].split(", "):
        assert (ROOT / path).exists(), path


def test_the_text_says_that_nothing_ran_as_long_as_nothing_did():
    ran = any(row[3] != NOT_YET for row in rows("With a GPU"))
    assert ("nothing of ringsim has run on a GPU" in PAGE.read_text()) is not ran


def written(folder, **changes):
    values = {
        "started": "2026-12-01 10:00:00 +0000",
        "sections": {
            "facts": {"status": "passed", "values": {"device": {"device": "NVIDIA H200"}}},
            "speed": {"status": "passed", "values": {}},
        },
    } | changes
    (folder / "gpu").mkdir(exist_ok=True)
    (folder / "gpu" / "a.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("shown", "changes", "said"),
    [
        ("2026-12-01, NVIDIA H200, [JSON](gpu/a.json)", {}, None),
        ("2026-12-02, NVIDIA H200, [JSON](gpu/a.json)", {}, "is of 2026-12-01"),
        ("2026-12-01, NVIDIA H100, [JSON](gpu/a.json)", {}, "not of NVIDIA H100"),
        ("2026-12-01, NVIDIA H200, [JSON](gpu/b.json)", {}, "does not exist"),
        ("2026-12-01, NVIDIA H200, [JSON](gpu/a.json)", {"sections": {"speed": {"status": "missed"}}}, "is missed"),
        ("2026-12-01, NVIDIA H200, [JSON](gpu/a.json)", {"sections": {}}, "speed of gpu/a.json is missing"),
        ("seen on an H200", {}, "neither"),
    ],
)
def test_what_does_not_show_a_claim_is_refused(tmp_path, shown, changes, said):
    written(tmp_path, **changes)
    found = problem(shown, "speed", tmp_path)
    assert found is None if said is None else said in found
