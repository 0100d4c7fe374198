"""Files that are computed once and cached next to the data: complete or absent, even after a kill or on a full disk.

A file is written under a hidden name next to the final one and renamed when complete (`create_file`). One process makes
it; others that need the same file wait for its lock, which the system releases if the process is killed. The next
process then reuses the hidden file. An array that takes hours to compute (`fill_array`) is appended to a hidden file
that begins with the header of the finished file: its size tells how many values are stored, and none stay in memory.
"""

from __future__ import annotations

import fcntl
import io
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from blt_runtime.errors import InputError

SYNC_SECONDS = 10.0
"""The work that a power cut may lose; a kill loses nothing that was appended."""
Float = NDArray[np.float32]
log = logging.getLogger("blt.data")


def fill_array(path: Path, length: int, step: int, compute: Callable[[int], Iterable[Float]]) -> None:
    """Makes the file `path`, float32 [length] in numpy's format, unless it exists.

    compute: yields the values from a given number on, the number already stored (a multiple of `step`).

    Raises InputError if the folder cannot be written; the values appended until then are kept for the next call.
    """
    with writable_folder(path.parent, " (what was computed is kept)"), _locked_draft(path) as draft:
        if draft is not None:
            _append(draft, length, step, compute)
            Path(draft.name).replace(path)


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
        with draft.open("a+b") as file:
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


def _append(file: BinaryIO, length: int, step: int, compute: Callable[[int], Iterable[Float]]) -> None:
    header = _header(length)
    file.seek(0)
    if file.read(len(header)) != header:  # a new file, or one killed in its first bytes
        file.truncate(0)
        file.write(header)
    done = max(0, file.seek(0, os.SEEK_END) - len(header)) // 4
    done = done if done == length else done // step * step
    file.truncate(len(header) + 4 * done)
    synced = time.monotonic()
    for values in compute(done) if done < length else ():
        file.write(np.ascontiguousarray(values, "<f4").data)
        file.flush()
        done += len(values)
        if time.monotonic() - synced > SYNC_SECONDS:
            os.fsync(file.fileno())
            synced = time.monotonic()
    file.flush()
    os.fsync(file.fileno())
    assert done == length


def _header(length: int) -> bytes:
    """The header that numpy writes for a float32 array [length]."""
    text = io.BytesIO()
    what = {"descr": "<f4", "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(text, what)
    return text.getvalue()
