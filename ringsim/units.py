"""Quantities with explicit units: parsing for YAML and the command line, formatting for people. SI only, per direction."""

from __future__ import annotations

import re
import sys
from fractions import Fraction
from typing import Final

from .errors import RingsimError


class UnitError(RingsimError, ValueError):
    """A quantity without a unit, with a wrong one, or outside its range."""


_SI: Final = {"": 0, "k": 3, "K": 3, "M": 6, "G": 9, "T": 12, "P": 15}
_BINARY: Final = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40}


def _scaled(unit: str, factor: Fraction = Fraction(1)) -> dict[str, Fraction]:
    return {prefix + unit: 10**power * factor for prefix, power in _SI.items()}


_BYTES: Final = _scaled("B") | {prefix + "B": Fraction(2**power) for prefix, power in _BINARY.items()}
DIMENSIONS: Final[dict[str, dict[str, Fraction]]] = {
    "time": {unit: Fraction(1, 10**power) for unit, power in (("s", 0), ("ms", 3), ("us", 6), ("µs", 6), ("ns", 9))},
    "size": _BYTES,
    "bandwidth": {f"{unit}/s": scale for unit, scale in (_BYTES | _scaled("bit", Fraction(1, 8))).items()},
    "rate": {f"{unit}/s": scale for unit, scale in _scaled("FLOP").items()},
}
_EXAMPLE: Final = {"time": "8 us", "size": "80 GB", "bandwidth": "450 GB/s or 400 Gbit/s", "rate": "989 TFLOP/s"}
_QUANTITY: Final = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?([0-9]+))?)\s*([^0-9\s].*?)?\s*")
LONGEST, LONGEST_EXPONENT = 64, 3


def shown(value: object) -> str:
    """A value as a message can show it."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of very many digits"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def parse(text: object, dimension: str) -> float:
    """Read a quantity such as ``450 GB/s`` in SI base units (s, B, B/s, FLOP/s); the result is correctly rounded.

    Raises UnitError when the unit is missing, belongs to another dimension, or the value is negative or not finite.
    """
    match = _QUANTITY.fullmatch(text) if isinstance(text, str) and len(text) <= LONGEST else None
    if match is None:
        what = "a bare number" if isinstance(text, int | float) and not isinstance(text, bool) else "no quantity"
        raise UnitError(f"{shown(text)} is {what}: write a {dimension} with its unit, e.g. {_EXAMPLE[dimension]}")
    number, exponent, unit = match.groups()
    units = DIMENSIONS[dimension]
    if unit is None:
        raise UnitError(f"{shown(text)} has no unit: write a {dimension} such as {_EXAMPLE[dimension]}")
    if unit not in units:
        raise UnitError(f"{shown(text)}: {unit!r} is no unit of {dimension}; {_alias(unit, units)}allowed: {', '.join(units)}")
    value = Fraction(number) * units[unit] if len(exponent or "") <= LONGEST_EXPONENT else -1
    if not 0 <= value <= Fraction(sys.float_info.max):
        raise UnitError(f"{shown(text)} is out of range: a {dimension} is finite and not negative")
    return float(value)


def _alias(unit: str, units: dict[str, Fraction]) -> str:
    """A hint for other common spellings: Gb/s and Gbps are bits, GBps are bytes."""
    match = re.fullmatch(r"([kKMGTP]?)([bB])(?:ps|/s|/sec)", unit)
    meant = f"{match[1]}{'bit' if match[2] == 'b' else 'B'}/s" if match else ""
    return f"did you mean {meant!r}? " if meant in units else ""


def dimension(text: str) -> str | None:
    """What a quantity measures, by its unit; None for any other text."""
    match = _QUANTITY.fullmatch(text) if len(text) <= LONGEST else None
    return next((name for name, units in DIMENSIONS.items() if match is not None and match[3] in units), None)


_TOKENS: Final = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
MOST_TOKENS = 2**63 - 1


def parse_tokens(text: str) -> int:
    """Read a count of tokens: ``6``, ``8K`` (8 x 1024), ``1M`` (1024 x 1024). Raises UnitError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]?)\s*", text) if len(text) <= LONGEST else None
    if match is None:
        raise UnitError(f"{shown(text)} is no count of tokens: write e.g. 6, 8K (= 8192) or 1M (= 1048576)")
    value = Fraction(match[1]) * _TOKENS[match[2]]
    if value.denominator != 1:
        raise UnitError(f"{shown(text)} is not a whole number of tokens ({float(value)})")
    if value > MOST_TOKENS:
        raise UnitError(f"{shown(text)} is more than {MOST_TOKENS} tokens")
    return int(value)


def _format(value: float, scale: tuple[tuple[float, str], ...]) -> str:
    """Four digits, in the largest unit that leaves at least one before the point."""
    value = float(f"{value:.4g}")
    factor, unit = next((entry for entry in scale if abs(value) >= entry[0]), scale[-1])
    number = value / factor
    return f"{number:.0f} {unit}" if abs(number) >= 1000 else f"{number:.4g} {unit}"


def format_time(seconds: float) -> str:
    """Seconds for people: ``1.234 ms``."""
    return _format(seconds, ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")))


def format_size(nbytes: float) -> str:
    """Bytes for people, SI: ``16.78 MB``."""
    return _format(nbytes, ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")))


def format_rate(per_s: float, unit: str = "FLOP/s") -> str:
    """A rate for people: ``133.5 GFLOP/s``."""
    return _format(
        per_s,
        tuple((10.0**power, prefix + unit) for prefix, power in (("P", 15), ("T", 12), ("G", 9), ("M", 6), ("k", 3), ("", 0))),
    )
