"""Reads a long line of JSON in blocks: the strings under the wanted keys are kept, everything else is skipped.

`json` needs several times a line's size, and far more for a line of many small lists. Here memory holds one block, and
each wanted string goes to a sink piece by piece. The syntax inside skipped values is not checked.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable
from typing import BinaryIO, Protocol

BLOCK_BYTES = 1 << 20
LONGEST_KEY = 1 << 16
Path = tuple[str, ...]
_SPACE = re.compile(rb"[ \t\r\n]*")
_WORD = re.compile(rb"[-+.0-9A-Za-z]*")
_PLAIN = re.compile(rb'[^"\\\x00-\x1f]+')
_ESCAPES = re.compile(rb'(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))+')
_LONGEST_ESCAPE = 12  # a surrogate pair
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}$")
_BRACKET = re.compile(rb"[][{}]")


class Sink(Protocol):
    """Receives the bytes of a string, in UTF-8."""

    def append(self, content: bytes, /) -> object: ...


class LongLine:
    """A line that begins with `begin` and goes on in `lines`. `read` may be called once; it ends at the line's end."""

    def __init__(self, begin: bytes, lines: BinaryIO):
        self._lines, self._block, self._at = lines, begin, 0
        self._ended = begin.endswith(b"\n")
        self._objects: set[Path] = set()

    def read(self, wanted: Iterable[Path], sink: Callable[[], Sink]) -> dict[Path, Sink | str | None]:
        """The values under paths of keys that the line has: the sink of a string, None for null, else a word.

        A path through null is null. Raises ValueError if the line is not one JSON object, or has a wanted key twice.
        """
        self._wanted, self._sink = set(wanted), sink
        self._found: dict[Path, Sink | str | None] = {}
        if self._next() != b"{":
            raise ValueError("not an object")
        self._object(())
        if self._peek():
            raise ValueError("more than one value in a line")
        return self._found

    def _extend(self) -> bool:
        """Appends the next block of the line to what is left of this one; False at the line's end."""
        if self._ended:
            return False
        more = self._lines.readline(BLOCK_BYTES)
        self._ended = not more or more.endswith(b"\n")
        self._block, self._at = self._block[self._at :] + more, 0
        return bool(more)

    def _peek(self) -> bytes:
        """The next byte that is no space; nothing at the end of the line."""
        while True:
            self._at = _SPACE.match(self._block, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._block) or not self._extend():
                return self._block[self._at : self._at + 1]

    def _next(self) -> bytes:
        byte = self._peek()
        self._at += len(byte)
        return byte

    def _object(self, path: Path) -> None:
        """The rest of an object after its brace."""
        if path in self._objects:
            raise ValueError(f"the key {path[-1]!r} occurs twice in one object")
        self._objects.add(path)
        if self._peek() == b"}":
            self._next()
            return
        byte = b","
        while byte == b",":
            if self._next() != b'"':
                raise ValueError("a key is missing")
            key = _Key()
            self._string(key)
            if self._next() != b":":
                raise ValueError("a colon is missing")
            self._member((*path, key.content.decode()))
            byte = self._next()
        if byte != b"}":
            raise ValueError("a comma or a brace is missing")

    def _member(self, path: Path) -> None:
        longer = {wanted for wanted in self._wanted if len(wanted) > len(path) and wanted[: len(path)] == path}
        if path in self._found:
            raise ValueError(f"the key {path[-1]!r} occurs twice in one object")
        byte = self._peek()
        value: Sink | str | None = "another kind of value"
        if path in self._wanted and byte == b'"':
            self._next()
            value = self._sink()
            self._string(value)
        elif longer and byte == b"{":
            self._next()
            self._object(path)
        elif self._skip() == b"null":
            value = None
            self._found |= dict.fromkeys(longer)
        if path in self._wanted:
            self._found[path] = value

    def _skip(self) -> bytes:
        """Skips a value. Returns a number or a word, and nothing for other values."""
        byte = self._peek()
        if byte == b'"':
            self._next()
            self._string(None)
            return b""
        if byte not in (b"[", b"{"):
            return self._word()
        depth = 0
        while self._at < len(self._block) or self._extend():
            quote = self._block.find(b'"', self._at)
            end = quote if quote >= 0 else len(self._block)
            for bracket in _BRACKET.finditer(self._block, self._at, end):
                depth += 1 if bracket[0] in b"[{" else -1
                if not depth:
                    self._at = bracket.end()
                    return b""
            self._at = end
            if quote >= 0:
                self._at += 1
                self._string(None)
        raise ValueError("it ends inside a value")

    def _word(self) -> bytes:
        word = b""
        while True:
            match = _WORD.match(self._block, self._at)
            assert match is not None
            word, self._at = (word + match[0])[:20], match.end()
            if self._at < len(self._block) or not self._extend():
                break
        if not word:
            raise ValueError("a value is missing")
        return word

    def _string(self, sink: Sink | None) -> None:
        """The rest of a string after its quote."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        while self._at < len(self._block) or self._extend():
            plain = _PLAIN.match(self._block, self._at)
            if plain is not None:
                self._at = plain.end()
                if sink is not None:
                    sink.append(decoder.decode(plain[0]).encode())
                continue
            decoder.decode(b"", final=True)
            byte = self._block[self._at : self._at + 1]
            if byte == b'"':
                self._at += 1
                return
            if byte != b"\\":
                raise ValueError("a control character in a string")
            text = self._escapes()
            if sink is not None:
                sink.append(text.encode("utf-8", errors="ignore"))  # without lone surrogates
        raise ValueError("it ends inside a string")

    def _escapes(self) -> str:
        """Consecutive escape sequences of this block; the halves of a surrogate pair stay together."""
        while len(self._block) - self._at < _LONGEST_ESCAPE and self._extend():
            pass
        match = _ESCAPES.match(self._block, self._at)
        if match is None:
            raise ValueError("an invalid escape sequence in a string")
        found = match[0]
        at_end = match.end() > len(self._block) - _LONGEST_ESCAPE and not self._ended
        if at_end and len(found) > 6 and _HIGH_SURROGATE.search(found):
            found = found[:-6]
        self._at += len(found)
        text: str = json.loads(b'"' + found + b'"')
        return text


class _Key:
    """The sink of a key. Raises ValueError beyond LONGEST_KEY bytes."""

    def __init__(self) -> None:
        self.content = b""

    def append(self, content: bytes) -> None:
        self.content += content
        if len(self.content) > LONGEST_KEY:
            raise ValueError("a key is too long")
