"""The tables of docs/strategies.md and docs/backward.md are what docs/family.py writes, where a cell is quickly made again."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
QUICK = {"ring", "burst", "double-ring(8)", "q-ring", "token-ring", "multi-ring(4)", "dense", "local-window(4K)"}


def family():
    spec = importlib.util.spec_from_file_location("family", DOCS / "family.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FAMILY = family()


def shown(page, name):
    """A table's cells by head of row."""
    (table,) = re.findall(rf"<!-- {name} -->\n((?:.|\n)*?)\n<!-- end -->", (DOCS / page).read_text())
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, tables in FAMILY.PAGES.items() for name in tables])
def test_every_row_is_there_and_the_quick_cells_are_current(page, name):
    found, rows = shown(page, name), FAMILY.PAGES[page][name]
    assert list(found) == [head for head, _ in rows]
    for head, cases in rows:
        assert len(found[head]) == len(FAMILY.LENGTHS)
        for case, cell in zip(cases, found[head], strict=True):
            if case.gpus <= 64 and case.tokens <= 2**20 and case.strategy in QUICK:
                assert FAMILY.cell(case) == cell, f"{head}, {case.tokens}: write it anew: python docs/family.py"
