"""The tables of docs/machines.md and docs/memory.md are what docs/tables.py writes."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def tables():
    spec = importlib.util.spec_from_file_location("tables", DOCS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["machines.md", "memory.md"])
def test_the_tables_are_current(page):
    text = (DOCS / page).read_text()
    assert tables().renew(page, text) == text, "write them anew: python docs/tables.py"
