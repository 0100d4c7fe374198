"""From a stream of bytes to text that can be shown: complete characters, and nothing after a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping

from .errors import UsageError, shown
from .ids import to_bytes


class Utf8Stream:
    """Decodes UTF-8 piece by piece. Invalid bytes, and an incomplete character at the end, become U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes) -> str:
        """The characters that are complete now (may be empty)."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The rest at the end: empty, or U+FFFD."""
        return self._decoder.decode(b"", final=True)


def listed_stops(stops: Iterable[str | bytes] | str | bytes | None) -> tuple[str | bytes, ...]:
    """One stop string or several as a tuple. Raises UsageError if they are neither."""
    if stops is None:
        return ()
    if isinstance(stops, str | bytes | bytearray):
        return (stops,)
    try:
        each = None if isinstance(stops, Mapping) else iter(stops)
    except TypeError:
        each = None
    if each is None:
        raise UsageError(f"stop must be text, bytes or a list of them, not {shown(stops)}")
    found = []
    for stop in each:
        to_bytes(stop, "a stop string")  # here, since an iterator of something else may not end
        found.append(stop)
    return tuple(found)


class StopMatcher:
    """Holds back bytes that may begin a stop string, and passes on the rest.

    After `feed` has read a whole stop string, `stopped` is True, and neither the string nor later bytes are returned.
    The text ends with the first byte that completes a stop string, before the longest one that it completes.
    So the result does not depend on how the bytes are divided into pieces.
    Raises UsageError for an empty stop string, and for one that is not text or bytes.
    """

    def __init__(self, stops: Iterable[str | bytes] | str | bytes | None = None) -> None:
        self._stops = [to_bytes(stop, "a stop string") for stop in listed_stops(stops)]
        if any(not stop for stop in self._stops):
            raise UsageError("a stop string must not be empty")
        self._held = b""
        self.stopped = False

    def feed(self, data: bytes) -> bytes:
        """Bytes that are certainly before any stop string."""
        if self.stopped or not self._stops:
            return b"" if self.stopped else data
        self._held += data
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, start = min(found)
            self.stopped, out, self._held = True, self._held[:start], b""
            return out
        keep = max(self._overlap(stop) for stop in self._stops)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> bytes:
        """The bytes held back when the text ends without a stop string."""
        out, self._held = self._held, b""
        return out

    def _overlap(self, stop: bytes) -> int:
        """Length of the longest suffix of the held bytes that is a prefix of `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
