"""What a machine says about itself (`nvidia-smi topo -m`, NCCL's dump, hwloc), as topology YAML."""

from .reading import FORMATS, Imported, parse, read

__all__ = ["FORMATS", "Imported", "parse", "read"]
