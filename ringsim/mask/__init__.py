"""Masks: which query sees which key, and the tiles that this leaves of a pair of spans. docs/masks.md lists them."""

from .algebra import And, Full, Not, Or, both, either
from .bands import Causal, Window
from .blocks import BlockSparse
from .documents import Documents
from .keys import First, PrefixLM
from .protocol import Mask, Piece
from .text import KNOWN, mask_named, shortened

__all__ = [
    "KNOWN",
    "And",
    "BlockSparse",
    "Causal",
    "Documents",
    "First",
    "Full",
    "Mask",
    "Not",
    "Or",
    "Piece",
    "PrefixLM",
    "Window",
    "both",
    "either",
    "mask_named",
    "shortened",
]
