"""Masks as text: ``causal & (first(4) | window(1K))``, the inverse of a mask's name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from ..calls import Call, parse_call
from ..errors import RingsimError, WorkloadError
from ..units import parse_tokens
from .algebra import Expression, Full
from .bands import Causal, Window
from .blocks import BlockSparse
from .documents import Documents
from .keys import First, PrefixLM

KNOWN: Final = (
    "full",
    "causal",
    "window(left, right)",
    "documents(length, NxLENGTH, ...)",
    "first(count, count@start, ...)",
    "prefix(count)",
    "blocks(q_block, k_block, ROWSxCOLUMNS, packed)",
)
"""What a mask is made of, joined by & | ~ and parentheses."""

DEEPEST: Final = 100
MOST_DOCUMENTS: Final = 2**20
_WORD: Final = re.compile(r"\s*([a-z][a-z0-9-]*(?:\s*\([^()&|~]*\))?|[&|~()])")


def mask_named(text: str) -> Expression:
    """The mask that `text` describes, by the grammar of docs/masks.md. Raises WorkloadError with the place and what is known."""
    if not isinstance(text, str):
        raise WorkloadError(f"a mask as text is wanted, such as 'causal & window(4K)', not {text!r}")
    words: list[str] = []
    at = 0
    while at < len(text.rstrip()):
        match = _WORD.match(text, at)
        if match is None:
            raise _fault(text, f"cannot read on from {shortened(text[at:].strip(), 20)!r}")
        words.append(match[1])
        at = match.end()
    reader = _Reader(text, words)
    mask = reader.union(0)
    if reader.at < len(words):
        raise _fault(text, f"{shortened(reader.words[reader.at], 20)!r} is not expected there")
    return mask


def shortened(text: str, most: int = 60) -> str:
    """`text` with its middle left out, if it has more than `most` characters."""
    ends = (most - 3) // 2
    return text if len(text) <= most else f"{text[: most - 3 - ends]}...{text[-ends:]}"


class _Reader:
    """Reads words by recursive descent: ``|`` binds least, then ``&``, then ``~``."""

    def __init__(self, text: str, words: list[str]) -> None:
        self.text = text
        self.words = words
        self.at = 0

    def union(self, depth: int) -> Expression:
        mask = self.intersection(depth)
        while self._take("|"):
            mask = mask | self.intersection(depth)
        return mask

    def intersection(self, depth: int) -> Expression:
        mask = self.term(depth)
        while self._take("&"):
            mask = mask & self.term(depth)
        return mask

    def term(self, depth: int) -> Expression:
        if depth > DEEPEST:
            raise _fault(self.text, f"more than {DEEPEST} levels of ~ and parentheses")
        if self._take("~"):
            return ~self.term(depth + 1)
        if self._take("("):
            mask = self.union(depth + 1)
            if not self._take(")"):
                raise _fault(self.text, "a ) is missing")
            return mask
        if self.at == len(self.words) or self.words[self.at] in "&|)":
            found = f"before {self.words[self.at]!r}" if self.at < len(self.words) else "at the end"
            raise _fault(self.text, f"a mask is missing {found}")
        self.at += 1
        return self._named(self.words[self.at - 1])

    def _take(self, word: str) -> bool:
        found = self.at < len(self.words) and self.words[self.at] == word
        self.at += found
        return found

    def _named(self, word: str) -> Expression:
        call = parse_call(word, "mask")
        if call.name not in _MAKERS:
            raise WorkloadError(f"unknown mask {call.name!r}; known: {_known()}")
        try:
            return _MAKERS[call.name](call)
        except (RingsimError, _Arguments) as error:
            expected = next(known for known in KNOWN if known.partition("(")[0] == call.name)
            raise _fault(self.text, str(error) or f"{shortened(word)!r} is not of the form {expected}") from None


class _Arguments(Exception):
    """Of a number or names that a mask does not take."""


def _fault(text: str, problem: str) -> WorkloadError:
    return WorkloadError(f"mask {shortened(text)!r}: {problem}; allowed: {_known()}")


def _known() -> str:
    return f"{', '.join(KNOWN)}, joined by & | ~ ( )"


def _positional(call: Call, least: int, most: int) -> tuple[str, ...]:
    if call.named or not least <= len(call.args) <= most:
        raise _Arguments
    return call.args


def _window(call: Call) -> Expression:
    if len(call.args) > 2 or not set(call.named) <= {"left", "right"}:
        raise _Arguments
    given = dict(zip(("left", "right"), call.args, strict=False))
    if set(given) & set(call.named):
        raise _Arguments
    sides = {name: parse_tokens(value) for name, value in (given | call.named).items()}
    return Window(sides.get("left"), sides.get("right"))


def _documents(call: Call) -> Expression:
    lengths: list[int] = []
    for word in _positional(call, 0, MOST_DOCUMENTS):
        times, cross, length = word.rpartition("x")
        count = parse_tokens(times) if cross else 1
        if len(lengths) + count > MOST_DOCUMENTS:
            raise WorkloadError(f"more than {MOST_DOCUMENTS} documents")
        lengths += [parse_tokens(length)] * count
    return Documents(tuple(lengths))


def _first(call: Call) -> Expression:
    runs = [word.partition("@") for word in _positional(call, 1, MOST_DOCUMENTS)]
    starts = tuple(parse_tokens(start) if at else 0 for _, at, start in runs)
    return First([parse_tokens(count) for count, _, _ in runs], starts)


def _prefix(call: Call) -> Expression:
    return PrefixLM(parse_tokens(*_positional(call, 1, 1)))


def _blocks(call: Call) -> Expression:
    q_block, k_block, shape, packed = _positional(call, 4, 4)
    rows, _, columns = shape.partition("x")
    return BlockSparse.unpacked(parse_tokens(q_block), parse_tokens(k_block), (parse_tokens(rows), parse_tokens(columns)), packed)


def _plain(mask: Expression) -> Callable[[Call], Any]:
    def make(call: Call) -> Expression:
        _positional(call, 0, 0)
        return mask

    return make


_MAKERS: Final[dict[str, Callable[[Call], Expression]]] = {
    "full": _plain(Full()),
    "causal": _plain(Causal()),
    "window": _window,
    "documents": _documents,
    "first": _first,
    "prefix": _prefix,
    "blocks": _blocks,
}
