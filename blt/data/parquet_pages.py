"""The sizes of a parquet file's pages, from the headers in front of them; no page is decompressed.

Arrow allocates what a page's header claims, and a few kilobytes may claim 2 GB. The metadata at the file's end repeats
only the sum over a column, which nothing compares with the pages. Headers are structs in Thrift's compact protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

HEADER_BYTES = 1 << 16
_DICTIONARY_PAGE = 2
_SIZES = {1: "kind", 2: "uncompressed", 3: "compressed"}
_DEEPEST = 16


class Page(NamedTuple):
    """One page. A dictionary page holds the values that other pages refer to."""

    dictionary: bool
    uncompressed: int


def pages(path: Path, metadata: Any, columns: set[str]) -> Iterator[Page]:
    """The pages of all columns with these paths, up to the first damaged header of each: Arrow reports the damage."""
    with path.open("rb") as file:
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            for number in range(group.num_columns):
                chunk = group.column(number)
                if chunk.path_in_schema in columns:
                    yield from _pages_of(file, chunk)


def _pages_of(file: BinaryIO, chunk: Any) -> Iterator[Page]:
    at = chunk.data_page_offset
    if chunk.dictionary_page_offset and 0 < chunk.dictionary_page_offset < at:
        at = chunk.dictionary_page_offset
    end = at + chunk.total_compressed_size
    while 0 <= at < end:
        file.seek(at)
        try:
            header = _Header(file.read(HEADER_BYTES))
        except (IndexError, ValueError):
            return
        found = header.found
        if found.get("compressed", -1) < 0 or found.get("uncompressed", -1) < 0:
            return
        yield Page(found.get("kind") == _DICTIONARY_PAGE, found["uncompressed"])
        at += header.at + found["compressed"]


class _Header:
    """Reads one struct. `found` has the fields of _SIZES, `at` is the number of bytes read."""

    def __init__(self, data: bytes):
        self._data, self.at = data, 0
        self.found: dict[str, int] = {}
        self._struct(self.found, 0)

    def _struct(self, found: dict[str, int] | None, depth: int) -> None:
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        number = 0
        while byte := self._byte():
            kind, step = byte & 15, byte >> 4
            number = number + step if step else self._integer()
            value = self._value(kind, depth)
            if found is not None and value is not None and number in _SIZES:
                found[_SIZES[number]] = value

    def _value(self, kind: int, depth: int) -> int | None:
        """Reads a value; its number if it is an integer."""
        if kind in (1, 2):  # a Boolean is part of its field's kind
            return None
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 8:
            size = self._varint()
            self.at += size
        elif kind == 12:
            self._struct(None, depth + 1)
        elif kind in (9, 10):
            byte = self._byte()
            size = byte >> 4 if byte >> 4 < 15 else self._varint()
            for _ in range(min(size, HEADER_BYTES)):
                self._value(byte & 15, depth + 1)
        elif kind in (3, 7):
            self.at += 1 if kind == 3 else 8
        else:
            raise ValueError("an unknown kind of value")
        return None

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("an integer of more than 10 bytes")

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]
