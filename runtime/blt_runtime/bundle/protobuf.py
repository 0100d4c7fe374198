"""The wire format of Protocol Buffers, as much as is needed to check an ONNX file before another library parses it.

A message is a sequence of fields. `Reader.read` returns them by number, and raises `Malformed` for a field that the
caller does not expect, for one of another wire type and for one that ends after its message. It does not recurse: the
caller reads the messages that it expects, so depth is bounded by the caller's code. All messages of one file share a
budget of fields.
"""

from __future__ import annotations

from collections.abc import Mapping

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_VARINT_BYTES = 10


class Malformed(ValueError):
    """Not a message of the expected type; the text says why."""


class Unexpected(Malformed):
    """A field `number` that the caller does not expect."""

    def __init__(self, number: int) -> None:
        super().__init__(f"a message has the unexpected field {number}")
        self.number = number


class Reader:
    """Reads messages until `budget` fields have been read; a hostile file of millions of fields ends early.

    Example:
        Reader(1000).read(b"\\x08\\x96\\x01", {1: VARINT})  # {1: [150]}
    """

    def __init__(self, budget: int) -> None:
        self._left = budget

    def read(self, message: bytes, expected: Mapping[int, int]) -> dict[int, list[int | bytes]]:
        """The fields of a message: for each number of `expected` a list of its values, in their order.

        expected: wire type of each field. A value is an int (varint, not sign-extended) or bytes. A repeated number may
        also be packed: numbers expected as VARINT are then unpacked. Raises Malformed.
        """
        found: dict[int, list[int | bytes]] = {number: [] for number in expected}
        at, end = 0, len(message)
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise Malformed("it has too many fields")
            key, at = varint(message, at)
            number, wire = key >> 3, key & 7
            if number not in expected:
                raise Unexpected(number)
            packed = wire == BYTES and expected[number] == VARINT
            if wire != expected[number] and not packed:
                raise Malformed(f"field {number} of a message has another wire type")
            if wire == VARINT:
                value, at = varint(message, at)
                found[number].append(value)
                continue
            size = 8 if wire == FIXED64 else 4
            if wire == BYTES:
                size, at = varint(message, at)
            if size > end - at:
                raise Malformed("a message ends in the middle of a field")
            data = message[at : at + size]
            at += size
            if packed:
                found[number] += self._unpack(data)
            else:
                found[number].append(data)
        return found

    def _unpack(self, data: bytes) -> list[int]:
        values, at = [], 0
        while at < len(data):
            self._left -= 1
            if self._left < 0:
                raise Malformed("it has too many fields")
            value, at = varint(data, at)
            values.append(value)
        return values


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at` and the index after it. Raises Malformed if it does not end, or takes over 64 bits."""
    value = shift = 0
    for byte in data[at : at + _VARINT_BYTES]:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            if value >> 64:
                break
            return value, at + shift // 7
    raise Malformed("a number does not end")


def signed(value: int) -> int:
    """A varint as int64."""
    return value - (1 << 64) if value >> 63 else value
