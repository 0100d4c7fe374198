"""Files that are computed once and cached next to the data, safe against a kill, a full disk and other processes.

A file is written under a hidden name next to the final one and renamed when complete (`create_file`). One process makes
it; others that need the same file wait for its lock, which the system releases if the process is killed. The next
process then reuses the hidden file. An array that takes hours to compute (`GrowingArray`) is computed in parts, in any
order: the hidden file has its final size from the start, and what is not computed yet is a hole.
"""

from __future__ import annotations

import fcntl
import io
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from blt_runtime import reading
from blt_runtime.errors import InputError

SYNC_SECONDS = 10.0
"""The work that a power cut may lose; a kill loses nothing that was appended."""
SCAN = 1 << 20
"""Values at a time in the search for holes."""
KEPT = " (what was computed is kept)"
Float = NDArray[np.float32]
Spans = list[tuple[int, int]]
log = logging.getLogger("blt.data")


class GrowingArray:
    """float32 [length] at `path` in numpy's format, computed in parts; a part is computed once and kept.

    Until all of it is computed, the file has a hidden name and holes read as EMPTY. A computed zero is stored as -0.0.
    So no index is stored next to the values, and a kill cannot make the two disagree.
    """

    EMPTY = np.int32(0)
    """The bits of a value that is not computed."""

    def __init__(self, path: Path, length: int):
        self.path, self.length = path, length
        self.complete = False
        self._values: Float | None = None
        self._thread = threading.Lock()
        self._open()

    def has(self, begin: int, end: int) -> bool:
        """Whether the values [begin, end) are computed."""
        if self.complete:
            return True
        return self._values is not None and bool((self._values[begin:end].view(np.int32) != self.EMPTY).all())

    def __getitem__(self, part: slice) -> Float:
        """Computed values; the caller has checked with `has`."""
        assert self._values is not None
        return self._values[part]

    def fill(self, missing: Callable[[], Spans], compute: Callable[[Spans], Iterable[tuple[int, Float]]]) -> None:
        """Computes what is missing; one thread of one process at a time.

        missing: the spans (begin, end) to compute. It is called with the file locked: another process may have
        computed some of them meanwhile.  compute: yields values with the position of the first one.

        Raises InputError if the folder cannot be written; the values written until then are kept.
        """
        with self._thread, writable_folder(self.path.parent, KEPT), _locked_draft(self.path) as draft:
            if draft is None:  # another process completed it
                self._open()
                return
            start = self._make_room(draft)
            self._values = _map(Path(draft.name), self.length)
            if spans := missing():
                self._write(draft, start, compute(spans))
            if self._all():
                Path(draft.name).replace(self.path)
                self.complete = True

    def _open(self) -> None:
        """Maps the finished file, or the unfinished one. Raises InputError if the finished one is damaged."""
        if self.path.exists():
            self._values, self.complete = _map(self.path, self.length), True
        elif (draft := draft_path(self.path)).exists():
            try:
                self._values = _map(draft, self.length)
            except (InputError, FileNotFoundError):
                self._values = None  # cut short by a kill, just completed, or of an older form: `fill` mends it

    def _make_room(self, file: BinaryIO) -> int:
        """Gives the file its header and its size, without using the disk. Returns where the values begin."""
        header = _header(self.length)
        file.seek(0)
        if file.read(len(header)) != header:  # a new file, or one killed in its first bytes
            file.truncate(0)
            file.seek(0)
            file.write(header)
            file.flush()
        written = (
            file.seek(0, os.SEEK_END) - len(header)
        ) // 4  # an older version appended; its last value may be torn
        file.truncate(len(header) + 4 * min(written, self.length))
        file.truncate(len(header) + 4 * self.length)
        return len(header)

    def _write(self, file: BinaryIO, start: int, parts: Iterable[tuple[int, Float]]) -> None:
        synced = time.monotonic()
        for at, values in parts:
            file.seek(start + 4 * at)
            file.write(np.where(values == 0, -0.0, values).astype("<f4").data)
            file.flush()
            if time.monotonic() - synced > SYNC_SECONDS:
                os.fsync(file.fileno())
                synced = time.monotonic()
        os.fsync(file.fileno())

    def _all(self) -> bool:
        return all(self.has(at, at + SCAN) for at in range(0, self.length, SCAN))


def create_file(path: Path, make: Callable[[BinaryIO], None]) -> None:
    """Makes the file `path` unless it exists: `make` writes its content to an empty file.

    Raises InputError if the folder cannot be written, and what `make` raises; then nothing is left.
    """
    with writable_folder(path.parent), _locked_draft(path) as draft:
        if draft is None:
            return
        draft.truncate(0)
        try:
            make(draft)
            draft.flush()
            os.fsync(draft.fileno())
        except BaseException:
            Path(draft.name).unlink(missing_ok=True)
            raise
        Path(draft.name).replace(path)


def draft_path(path: Path) -> Path:
    """The hidden file that becomes `path`. Only the process that makes `path`, or a file next to it, writes it."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def writable_folder(folder: Path, note: str = "") -> Iterator[None]:
    """Makes the folder, and turns an OSError inside the block into an InputError that ends with `note`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; free some space or make it writable, and run "
            f"again{note}"
        ) from error


@contextmanager
def _locked_draft(path: Path) -> Iterator[BinaryIO | None]:
    """The unfinished file of `path`, locked; None if another process finished `path` in the meantime."""
    draft = draft_path(path)
    while not path.exists():
        with open(draft, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666)) as file:
            _lock(file, draft)
            if draft.exists() and os.path.samestat(draft.stat(), os.fstat(file.fileno())):
                yield file
                return
    yield None


def _lock(file: BinaryIO, draft: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("waiting for another process that makes %s", draft)
        fcntl.flock(file, fcntl.LOCK_EX)


def _header(length: int) -> bytes:
    """The header that numpy writes for a float32 array [length]."""
    text = io.BytesIO()
    what = {"descr": "<f4", "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(text, what)
    return text.getvalue()


def _map(path: Path, length: int) -> Float:
    """The file as a read-only map. Raises InputError if it is damaged or has another shape."""
    try:
        values: Float = reading.read_array(path, mapped=True)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is damaged ({reading.reason(error)}); delete it and run again") from error
    if values.shape != (length,) or values.dtype != np.float32:
        raise InputError(f"{path} does not fit the data; delete it and run again")
    return values
