"""What the documents say can be typed: their commands parse, their YAML loads, their links lead somewhere."""

import re
from pathlib import Path

import click
import pytest

from ringsim import topology
from ringsim.cli.main import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:mpiexec -n \d+ |^ *)ringsim ((?:simulate|run|calibrate|compare|schedule) [^`#\n]*)", re.MULTILINE)


def commands():
    return [(page.name, found.split()) for page in PAGES for found in COMMAND.findall(page.read_text())]


def test_commands_are_found():
    assert {name for name, _ in commands()} >= {"README.md"}
    assert {arguments[0] for _, arguments in commands()} == set(cli.commands)


@pytest.mark.parametrize(
    ("page", "arguments"), commands(), ids=lambda value: value if isinstance(value, str) else "-".join(value[:2])
)
def test_commands_parse(page, arguments):
    name, *rest = arguments
    with cli.commands[name].make_context(name, [word for word in rest if word != "..."], parent=click.Context(cli)) as context:
        assert context.params


def test_the_topology_page_shows_a_valid_topology():
    page = (ROOT / "docs" / "topology.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    machine = topology.parse(example, "docs/topology.md")
    fields = {
        *topology.Topology.model_fields,
        *topology.Devices.model_fields,
        *topology.Attention.model_fields,
        *topology.Hop.model_fields,
    }
    assert [name for name in fields if not re.search(rf"\b{name}:", example)] == []
    assert machine.path.look == 60e-6


def test_the_workload_page_names_every_option():
    page = (ROOT / "docs" / "workload.md").read_text()
    from ringsim.workload_file import WorkloadFile

    assert [name for name in WorkloadFile.model_fields if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
