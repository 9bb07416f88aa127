"""What the documents say can be typed: their commands parse, their YAML loads, their links lead somewhere."""

import json
import re
import shlex
from pathlib import Path

import click
import jsonschema
import pytest
import yaml

from ringsim import topology
from ringsim.cli.main import cli
from ringsim.topology.groups import JOINS, MODELS, Connection, Nics
from ringsim.topology.parts import Attention, Device, Link, MicroTile, Regime, Route, Transport
from ringsim.topology.schema import schema
from ringsim.topology.spec import Spec

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(
    r"(?:mpi(?:exec|run) -n \d+ |^ *)ringsim "
    r"((?:simulate|memory|breakeven|run|calibrate|compare|doctor|schedule|strategies|topologies)(?: [^`#\n]*)?)",
    re.MULTILINE,
)


def commands():
    return [(page.name, shlex.split(found)) for page in PAGES for found in COMMAND.findall(page.read_text())]


def test_commands_are_found():
    assert {name for name, _ in commands()} >= {"README.md"}
    assert {arguments[0] for _, arguments in commands()} == set(cli.commands)


@pytest.mark.parametrize(
    ("page", "arguments"), commands(), ids=lambda value: value if isinstance(value, str) else "-".join(value[:2])
)
def test_commands_parse(page, arguments):
    name, *rest = arguments
    command = cli.commands[name]
    if isinstance(command, click.Group):
        command, rest = command.commands[rest[0]], rest[1:]
    with command.make_context(name, [word for word in rest if word != "..."], parent=click.Context(cli)) as context:
        assert context.params or rest == []


def test_the_topology_page_shows_a_valid_topology():
    page = (ROOT / "docs" / "topology.md").read_text()
    short, full, explicit = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(topology.parse(short, "docs/topology.md").devices) == 8
    assert len(short.splitlines()) <= 10
    assert len(topology.parse(full, "docs/topology.md").devices) == 32
    hub = topology.parse(short.split("machine:")[0] + explicit, "docs/topology.md")
    assert [len(hub.path(hub.devices[0], other).vertices) for other in hub.devices[1:]] == [1, 0]


def test_the_topology_page_names_every_key():
    page = (ROOT / "docs" / "topology.md").read_text()
    keys = {info.alias or name for model in models() for name, info in model.model_fields.items()}
    assert [key for key in sorted(keys) if not re.search(rf"\b{key}\b", page)] == []
    assert [join for join in JOINS if f"`{join}`" not in page] == []


def models():
    named = (Spec, Device, Attention, MicroTile, Link, Regime, Transport, Route, Nics, Connection)
    return (*named, *MODELS.values())


def test_the_published_schema_is_the_format():
    published = json.loads((ROOT / "docs" / "topology.schema.json").read_text())
    assert published == schema(), "write it anew: ringsim topologies schema -o docs/topology.schema.json"


def test_the_workload_page_names_every_option():
    page = (ROOT / "docs" / "workload.md").read_text()
    from ringsim.workload_file import WorkloadFile

    keys = [field.alias or name for name, field in WorkloadFile.model_fields.items()]
    assert [key for key in keys if f"`{key}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("name", [*topology.names(), 0, 1])
def test_the_schema_takes_what_ringsim_takes(name):
    page = (ROOT / "docs" / "topology.md").read_text()
    text = (
        (ROOT / "topologies" / f"{name}.yaml").read_text()
        if isinstance(name, str)
        else re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[name]
    )
    validator = jsonschema.Draft202012Validator(schema())
    plain = yaml.safe_load(text)
    assert [(fault.json_path, fault.message) for fault in validator.iter_errors(plain)] == []
    plain["links"] = {name: link | {"bandwidth": 450} for name, link in plain["links"].items()}
    assert not validator.is_valid(plain)


def test_the_schema_takes_what_removes_from_a_file_that_is_extended():
    validator = jsonschema.Draft202012Validator(schema())
    head = {"ringsim": 2, "name": "less", "source": "guessed: without", "extends": "dgx-h100-cluster"}
    for less in ({"links": {"ndr": None}}, {"links": {"ndr": {"achieved": None}}}, {"counts": {"nodes": None}}, {"place": None}):
        assert validator.is_valid(head | less), less
    assert not validator.is_valid(head | {"links": {"ndr": {"achived": None}}})
    assert not validator.is_valid({"ringsim": 2})


def test_the_schema_takes_groups_that_change_what_is_extended():
    validator = jsonschema.Draft202012Validator(schema())
    head = {"ringsim": 2, "name": "more", "source": "guessed: what if", "extends": "dgx-h100"}
    for change in ({"groups": {"dgx": {"count": 4}}}, {"groups": {"dgx": {"nics": None}}}, {"machine": {"backplane": "1 TB/s"}}):
        assert validator.is_valid(head | change), change
    assert not validator.is_valid(head | {"groups": {"dgx": {"cuont": 4}}})
    assert not validator.is_valid(head | {"groups": {"dgx": {"backplane": 4}}})
