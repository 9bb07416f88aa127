"""The tables of docs/strategies.md are what docs/family.py writes, as far as a cell is quickly made again."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
QUICK = {"ring", "double-ring(8)", "q-ring", "token-ring", "multi-ring(4)", "dense", "local-window(4K)"}


def family():
    spec = importlib.util.spec_from_file_location("family", DOCS / "family.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FAMILY = family()
PAGE = (DOCS / "strategies.md").read_text()


def shown(name):
    """A table's cells by head of row."""
    (table,) = re.findall(rf"<!-- {name} -->\n((?:.|\n)*?)\n<!-- end -->", PAGE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("name", FAMILY.TABLES)
def test_every_row_is_there_and_the_quick_cells_are_current(name):
    found = shown(name)
    assert list(found) == [head for head, _ in FAMILY.TABLES[name]]
    for head, cases in FAMILY.TABLES[name]:
        assert len(found[head]) == len(FAMILY.LENGTHS)
        for case, cell in zip(cases, found[head], strict=True):
            if case.gpus <= 64 and case.tokens <= 2**20 and case.strategy in QUICK:
                assert FAMILY.cell(case) == cell, f"{head}, {case.tokens}: write it anew: python docs/family.py"
