"""Machines as pictures: PNG or SVG. What repeats is drawn once or twice, so that one device and thousands are both legible."""

from .paint import draw

__all__ = ["draw"]
