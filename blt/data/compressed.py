"""Opens plain and compressed files for reading: gzip, zstd, xz, lzma, bzip2, and lz4 if its library is installed.

A truncated file is an error, never a shorter text, and all frames of a file are read (`pzstd` and `cat a.gz b.gz` write
several). Memory is bounded whatever a file expands to: output is made in pieces, and a file that needs a larger window
than `max_memory` is refused.
"""

from __future__ import annotations

import io
import lzma
import zlib
from bz2 import BZ2Decompressor
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from blt_runtime.errors import BackendError, InputError, MissingExtra

SUFFIXES = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".xz": "xz",
    ".lzma": "lzma",
    ".bz2": "bzip2",
    ".lz4": "lz4",
}
MAX_MEMORY = 256 << 20
"""The default of --max-memory: bytes that a decompressor's window, or a row of parquet, may need."""
COMPRESSED_BYTES = 1 << 17
"""Read at a time."""
EXPANDED_BYTES = 1 << 20
"""Made at a time."""
ZSTD_BYTES = 1 << 10
"""Compressed bytes that the zstd library gets at a time. It has no limit on its output: 128 kB of 4 bytes."""
LARGEST_ZSTD_WINDOW = 1 << 31
_LZMA_EXTRA = 16 << 20  # liblzma's memory besides the dictionary


def open_bytes(path: Path, compression: str | None = None, max_memory: int = MAX_MEMORY) -> BinaryIO:
    """The content of a regular file, decompressed.

    compression: as `magic.compression_of` names it; None for a plain file.  Opening and reading raise InputError for a
    file that is damaged, truncated or needs more than `max_memory`, and MissingExtra or BackendError without the
    library.
    """
    decoder = None if compression is None else _decoder(compression, path, max_memory)
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be opened ({error.strerror})") from error
    blocks = _plain(file) if decoder is None else _decompressed(file, decoder)
    return io.BufferedReader(_Stream(file, path, blocks, max_memory), EXPANDED_BYTES)


def read_zstandard(file: BinaryIO, name: str) -> bytes:
    """The decompressed content of an open file. Raises EOFError if it is truncated, and MissingExtra."""
    return b"".join(_decompressed(file, _decoder("zstd", Path(name), LARGEST_ZSTD_WINDOW)))


class _Decoder(Protocol):
    """Decompresses one frame: the interface of the standard library's bzip2 and lzma objects."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    @property
    def needs_input(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes: ...


class _Stream(io.RawIOBase):
    """The blocks of a file as a stream; a library's error becomes an InputError that names the file."""

    def __init__(self, file: BinaryIO, path: Path, blocks: Iterator[bytes], max_memory: int):
        self._file, self._path, self._blocks, self._max_memory = file, path, blocks, max_memory
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = memoryview(self._next())
        part, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _next(self) -> bytes:
        try:
            return next(self._blocks, b"")
        except Exception as error:
            damage = EOFError | OSError | ValueError | RuntimeError | lzma.LZMAError | zlib.error
            if not isinstance(error, damage) and type(error).__name__ != "ZstdError":
                raise
            if "memory" in str(error).lower():
                raise InputError(f"{self._path}: {self._needs_memory()}") from error
            raise InputError(f"{self._path}: cannot be read to its end ({error}); is the file complete?") from error

    def _needs_memory(self) -> str:
        window = _zstd_window(self._path)
        if window is None:
            return "decompressing it needs more memory than --max-memory; give a larger one"
        needs = f"it was compressed with a long window of {_size(window)}"
        if window > LARGEST_ZSTD_WINDOW:
            return f"{needs}, and no zstd reads more than {_size(LARGEST_ZSTD_WINDOW)}; compress it again"
        return f"{needs}, more than --max-memory {_size(self._max_memory)}; --max-memory {_size(window)} reads it"


def _size(n_bytes: int) -> str:
    """Rounded up, as --max-memory reads it."""
    return f"{-(-n_bytes >> 30)}G" if n_bytes >= 1 << 30 else f"{-(-n_bytes >> 20)}M"


def _zstd_window(path: Path) -> int | None:
    """Bytes of the window of a zstd file's first frame; None for another file."""
    try:
        import zstandard

        with path.open("rb") as file:
            return int(zstandard.get_frame_parameters(file.read(18)).window_size)
    except Exception:  # no library, no zstd file, or a frame that only begins
        return None


def _plain(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(EXPANDED_BYTES):
        yield block


def _decompressed(file: BinaryIO, new: Callable[[], _Decoder]) -> Iterator[bytes]:
    """The content of all frames, in blocks. Zeros after a frame are padding."""
    frame: _Decoder | None = None
    while data := file.read(COMPRESSED_BYTES):
        while data or (frame is not None and not frame.needs_input):
            if frame is None:
                data = data.lstrip(b"\0")
                if not data:
                    break
                frame = new()
            if block := frame.decompress(data, EXPANDED_BYTES):
                yield block
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
    while frame is not None and not frame.eof and (block := frame.decompress(b"", EXPANDED_BYTES)):
        yield block
    if frame is not None and not frame.eof:
        raise EOFError("it ends inside a frame")


class _Gzip:
    """One member of a gzip file."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._member.eof

    @property
    def unused_data(self) -> bytes:
        return self._member.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._member.unconsumed_tail

    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes:
        return self._member.decompress(self._member.unconsumed_tail + data, max_length)


class _Zstd:
    """One frame of a zstd file. Blocks of output have up to 32 MB: see ZSTD_BYTES."""

    def __init__(self, decompressor: Any):
        self._frame = decompressor.decompressobj()
        self._data = memoryview(b"")

    @property
    def eof(self) -> bool:
        return bool(self._frame.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._frame.unused_data) + bytes(self._data)

    @property
    def needs_input(self) -> bool:
        return not self._data

    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes:
        if data:
            self._data = memoryview(bytes(self._data) + data)
        part, self._data = self._data[:ZSTD_BYTES], self._data[ZSTD_BYTES:]
        return bytes(self._frame.decompress(part)) if part else b""


def _decoder(compression: str, path: Path, max_memory: int) -> Callable[[], _Decoder]:
    """Makes the object that decompresses one frame."""
    if compression == "gzip":
        return _Gzip
    if compression == "bzip2":
        return BZ2Decompressor
    if compression in ("xz", "lzma"):
        return lambda: lzma.LZMADecompressor(memlimit=max_memory + _LZMA_EXTRA)
    if compression == "lz4":
        return _lz4(path)
    library = _zstandard(path)
    decompressor = library.ZstdDecompressor(max_window_size=min(max_memory, LARGEST_ZSTD_WINDOW))
    return lambda: _Zstd(decompressor)


def _zstandard(path: Path) -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingExtra(f"{path} cannot be read: zstandard", "train") from error
    return zstandard


def _lz4(path: Path) -> Callable[[], _Decoder]:
    try:
        from lz4.frame import LZ4FrameDecompressor
    except ImportError as error:
        raise BackendError(
            f"{path} cannot be read: lz4 is not installed: pip install lz4, or compress it in another way"
        ) from error
    decoder: Callable[[], _Decoder] = LZ4FrameDecompressor
    return decoder
