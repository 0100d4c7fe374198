"""From a trickle of bytes to text that can be shown: complete characters, nothing behind a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from .errors import UsageError
from .ids import to_bytes


class Utf8Stream:
    """Text of bytes as they come. Invalid bytes and a tail that never completes become U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes) -> str:
        """The characters that are complete now (may be empty)."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What is left at the end: empty, or U+FFFD."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Holds back bytes that may be the start of a stop string; passes on the rest.

    After `feed` has seen a whole stop string, `stopped` is True and neither it nor anything behind it comes
    out.
    """

    def __init__(self, stops: Iterable[str | bytes] | str | bytes | None = None) -> None:
        listed = [stops] if isinstance(stops, str | bytes) else list(stops or ())
        self._stops = [to_bytes(stop) for stop in listed]
        if any(not stop for stop in self._stops):
            raise UsageError("a stop string must not be empty")
        self._held = b""
        self.stopped = False

    def feed(self, data: bytes) -> bytes:
        """Bytes that are certainly before any stop string."""
        if self.stopped or not self._stops:
            return b"" if self.stopped else data
        self._held += data
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self.stopped, out, self._held = True, self._held[: min(found)], b""
            return out
        keep = max(self._overlap(stop) for stop in self._stops)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> bytes:
        """What was held back, when the end came first."""
        out, self._held = self._held, b""
        return out

    def _overlap(self, stop: bytes) -> int:
        """Length of the longest end of the held bytes that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
