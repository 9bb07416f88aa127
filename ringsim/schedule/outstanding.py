"""The posts that are not waited for yet, found by the bytes that they use."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any

from .ops import Post, Region, Send

Span = tuple[int, int, int]
"""The bytes of a post from the first to after the last, and its id."""


class Outstanding:
    """One rank's outstanding posts: the emitter asks them what to wait for, `validate` whether that was done."""

    def __init__(self) -> None:
        self._posts: dict[int, Post] = {}
        self._spans: dict[tuple[str, int], list[Span]] = {}
        self._longest: dict[tuple[str, int], int] = {}

    def __contains__(self, post: object) -> bool:
        return post in self._posts

    def __iter__(self) -> Iterator[int]:
        return iter(self._posts)

    def __len__(self) -> int:
        return len(self._posts)

    def add(self, post: Post) -> None:
        """A post has been made."""
        slot, (begin, end) = (post.region.buffer, post.region.slot), post.region.extent
        self._posts[post.id] = post
        insort(self._spans.setdefault(slot, []), (begin, end, post.id))
        self._longest[slot] = max(self._longest.get(slot, 0), end - begin)

    def remove(self, ident: int) -> None:
        """A post has been waited for."""
        region = self._posts.pop(ident).region
        slot = region.buffer, region.slot
        spans = self._spans[slot]
        del spans[bisect_left(spans, (*region.extent, ident))]
        if not spans:
            del self._spans[slot], self._longest[slot]

    def hazards(self, reads: tuple[Region, ...], writes: tuple[Region, ...]) -> tuple[int, ...]:
        """Ids of the posts that must complete before an op that reads and writes these regions may start.

        Read after write (a region that is still arriving), write after read (a slot that is still being sent) and write
        after write. Order among computes is the program's own.
        """
        found = {post.id for region in reads for post in self._near(region) if not isinstance(post, Send)}
        found.update(post.id for region in writes for post in self._near(region))
        return tuple(sorted(found))

    def _near(self, region: Region) -> Iterator[Post]:
        """The posts that use bytes of the region."""
        slot = region.buffer, region.slot
        spans = self._spans.get(slot)
        if not spans:
            return
        begin, end = region.extent
        # whatever starts earlier by the longest post's length, or more, ends before the region begins
        low: Any = (begin - self._longest[slot] + 1,)
        high: Any = (end,)
        for _, _, ident in spans[bisect_left(spans, low) : bisect_left(spans, high)]:
            post = self._posts[ident]
            if region.overlaps(post.region):
                yield post
