"""Machines in YAML, compiled to a graph of devices, wires and shared resources. docs/topology.md is the reference."""

from .graph import pattern
from .layers import about, names
from .paths import Path
from .spec import FORMAT, Spec
from .topology import Topology, load, parse

__all__ = ["FORMAT", "Path", "Spec", "Topology", "about", "load", "names", "parse", "pattern"]
