"""Opens plain, gzip and zstandard files for reading. A truncated file is an error, never a shorter text.

The library's own zstandard reader ends silently where a file was truncated, and after the first of several frames (as
`pzstd` or `cat a.zst b.zst` write them). So this module reads frame by frame.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from blt_runtime.errors import InputError, MissingExtra

SUFFIXES = (".gz", ".zst")
COMPRESSED_BYTES = 1 << 17
"""Read at a time."""


def open_bytes(path: Path) -> BinaryIO:
    """The content of a file, decompressed according to its suffix.

    Raises InputError if it cannot be opened, and MissingExtra. Reading a damaged file raises one of `damage(path)`.
    """
    suffix = path.suffix.lower()
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror})") from error
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BufferedReader(_Frames(file, _zstandard(path)))
    return file


def damage(path: Path) -> tuple[type[Exception], ...]:
    """The errors that reading a damaged file raises."""
    errors: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error)
    return (*errors, _zstandard(path).ZstdError) if path.suffix.lower() == ".zst" else errors


def read_zstandard(file: BinaryIO, name: str) -> bytes:
    """The decompressed content of an open file. Raises EOFError if it is truncated, and MissingExtra."""
    return io.BufferedReader(_Frames(file, _zstandard(Path(name)))).read()


class _Frames(io.RawIOBase):
    """All frames of a zstandard file, one after another."""

    def __init__(self, file: BinaryIO, zstandard: Any):
        self._file, self._zstandard = file, zstandard
        self._blocks, self._rest = self._decompressed(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = next(self._blocks, b"")
        part, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompressed(self) -> Iterator[bytes]:
        frame = None
        while data := self._file.read(COMPRESSED_BYTES):
            while data:
                frame = frame or self._zstandard.ZstdDecompressor().decompressobj()
                if block := frame.decompress(data):
                    yield block
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("it ends inside a frame")


def _zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtra(f"{path} cannot be read: zstandard", "train") from error
    return zstandard
