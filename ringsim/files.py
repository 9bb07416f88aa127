"""Files written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from .errors import RingsimError


class FileError(RingsimError):
    """A file that cannot be written."""


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 to a temporary file beside `path`, then rename it. Raises FileError."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a temporary file beside `path`, then rename it. Raises FileError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FileError(f"{path}: cannot be written: {error.strerror}") from error
        raise


def check_writable(path: Path) -> None:
    """Raise FileError now, rather than after a long run, if `path` cannot be written."""
    parent = path.parent
    if not parent.is_dir():
        raise FileError(f"{path}: folder {parent} does not exist")
    if path.is_dir() or not os.access(path if path.exists() else parent, os.W_OK):
        raise FileError(f"{path}: cannot be written: {'a folder' if path.is_dir() else 'no permission'}")


def write_json(path: Path, value: Any) -> None:
    """Write JSON; what is not finite becomes null, which every reader takes."""
    write_text(path, json.dumps(_finite(value), indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
