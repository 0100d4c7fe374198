"""The contents of a stream's caches, and how to cut a range of tokens into calls that keep them intact.

Pure bookkeeping, no tensors. Calls write a cache at rising positions. Rolling back is possible as long
as no entry that is still needed has been overwritten.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from ..bundle.spec import CacheSpec
from ..ids import Ids


class CacheTrack:
    """How far a cache was written since it was last empty. Units: the graph's tokens (bytes or patches)."""

    def __init__(self, spec: CacheSpec | None, crosses_documents: bool) -> None:
        self.spec = spec
        self._restarts = not crosses_documents
        self.clear()

    def clear(self) -> None:
        self._end = 0
        self._document = 0

    def wrote(self, end: int, document: int) -> None:
        """A call wrote positions up to `end` (exclusive); its last token's document starts at `document`."""
        highest = self.spec is not None and self.spec.kind == "ring"
        self._end = max(self._end, end) if highest else end
        self._document = document

    def reached(self, end: int) -> None:
        """Positions up to `end` were written, but the last of them may be dropped. Only a ring records them."""
        if self.spec is not None and self.spec.kind == "ring":
            self._end = max(self._end, end)

    def room(self, position: int, document: int) -> int:
        """How many tokens may be written from `position` on, in the document that starts at `document`, so that
        dropping any number of the newest is exact: `can_resume` stays true from `position` on."""
        if self.spec is None:
            return sys.maxsize
        capacity, window = self.spec.capacity, self.spec.window
        if self.spec.kind == "linear" or window is None:
            return capacity - (position - document if self._restarts else position)
        step = capacity - window + 1
        if self.spec.kind == "ring":
            return step
        tokens = position - document  # a window evicts `step` entries at once, when the next token does not fit
        return capacity - tokens if tokens < capacity else (capacity - tokens) % step

    def can_resume(self, position: int, document: int) -> bool:
        """Whether the next call may start at `position`, in the document that starts at `document`."""
        if self.spec is None or position == document == 0:
            return True
        if self.spec.kind == "ring":
            # the graph assumes the C newest positions in the slots: other positions must be outside the window
            assert self.spec.window is not None
            return self._end <= self.spec.capacity or self._end - self.spec.capacity <= position - self.spec.window + 1
        if self._restarts and position == document:
            return True  # a new document starts over at slot 0
        if self._restarts and document != self._document:
            return False
        return self.spec.kind == "linear" or self._window_resumes(position)

    def _window_resumes(self, position: int) -> bool:
        """GroupQueryAttention's rule: dropping k tokens is exact when L(T - k) == L(T) - k."""
        assert self.spec is not None
        dropped = self._end - position
        return self._resident(position) == self._resident(self._end) - dropped

    def _resident(self, position: int) -> int:
        """L(T), the entries that a sliding-window cache keeps after T tokens of its document."""
        assert self.spec is not None
        assert self.spec.window is not None
        tokens, capacity = position - self._document, self.spec.capacity
        step = capacity - self.spec.window + 1
        return tokens if tokens <= capacity else tokens - step * -(-(tokens - capacity) // step)


def calls(
    start: int, end: int, cache: CacheSpec | None, limit: int, documents: Ids | None = None
) -> Iterator[tuple[int, int]]:
    """Cuts positions start..end into calls [a, b) of at most `limit` tokens that the cache allows.

    A call on a ring cache crosses no multiple of its capacity and keeps the window intact. documents [end - start]:
    doc_start per token, given when calls must not contain a change of it. Calls then also end where it changes.
    """
    if cache is not None:
        limit = min(limit, cache.longest_call)
    while start < end:
        stop = min(end, start + limit)
        if cache is not None and cache.kind == "ring":
            stop = min(stop, (start // cache.capacity + 1) * cache.capacity)
        if documents is not None:
            at = len(documents) - (end - start)
            same = documents[at : at + stop - start] == documents[at]
            stop = start + (int(same.argmin()) if not same.all() else stop - start)
        yield start, stop
        start = stop
