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
    """Write to a temporary file beside `path`, then rename it; where `path` is a link, beside its target. Raises FileError.

    What is no regular file (a pipe, /dev/stdout) is written to as it is.
    """
    target = _target(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if special(path):
            path.write_bytes(content)
            return
        temporary.write_bytes(content)
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FileError(f"{path}: cannot be written: {error.strerror}") from error
        raise


def special(path: Path) -> bool:
    """Whether there is something at `path` that is neither a file nor a folder, and must not be replaced by one."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _target(path: Path) -> Path:
    """Where a link leads; another path is itself."""
    try:
        return path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError) as error:
        raise FileError(f"{path}: cannot be written: a link that leads nowhere") from error


def check_writable(path: Path) -> None:
    """Raise FileError now, rather than after a long run, if `path` cannot be written."""
    if special(path):
        return
    parent = _target(path).parent
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
