"""Files that are made once and kept beside the data: complete or absent, whoever is killed and whatever is full.

Each is written as a hidden file beside the final one (`made`); the last step is a rename. One process makes it; others
that want the same file wait (a lock that the system takes back from a killed process), and what a kill has left is
taken over by the next. An array that is computed for hours (`filled`) is appended to a hidden file that begins with the
finished file's own header, so that its size says how much there is and nothing is held in memory.
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
"""What a power cut may cost; a kill costs nothing that was appended."""
Float = NDArray[np.float32]
log = logging.getLogger("blt.data")


def fill_array(path: Path, length: int, step: int, compute: Callable[[int], Iterable[Float]]) -> None:
    """Makes the file `path`, float32 [length] in numpy's format, unless it is there.

    compute: given how many values are stored already (a multiple of `step`), yields the rest. Raises InputError if the
    folder cannot be written; what was appended until then stays for the next call.
    """
    with writable_folder(path.parent, " (what was computed is kept)"), _claimed(path) as part:
        if part is not None:
            _append(part, length, step, compute)
            Path(part.name).replace(path)


def create_file(path: Path, make: Callable[[BinaryIO], None]) -> None:
    """Makes the file `path` unless it is there: `make` writes its content to an empty file.

    Raises InputError if the folder cannot be written, and what `make` raises; then nothing is left.
    """
    with writable_folder(path.parent), _claimed(path) as part:
        if part is None:
            return
        part.truncate(0)
        try:
            make(part)
            part.flush()
            os.fsync(part.fileno())
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise
        Path(part.name).replace(path)


def draft_path(path: Path) -> Path:
    """The hidden file that becomes `path`; only who makes `path`, or its companion, writes it."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def writable_folder(folder: Path, note: str = "") -> Iterator[None]:
    """Makes the folder; an error of writing there is an InputError, which ends with `note`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror or error}; make room there or make it writable, and run "
            f"again{note}"
        ) from error


@contextmanager
def _claimed(path: Path) -> Iterator[BinaryIO | None]:
    """The unfinished file behind `path`, locked; None if somebody finished `path` meanwhile."""
    part = draft_path(path)
    while not path.exists():
        with part.open("a+b") as file:
            _lock(file, part)
            if part.exists() and os.path.samestat(part.stat(), os.fstat(file.fileno())):
                yield file
                return
    yield None


def _lock(file: BinaryIO, part: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("waiting for another process that makes %s", part)
        fcntl.flock(file, fcntl.LOCK_EX)


def _append(file: BinaryIO, length: int, step: int, compute: Callable[[int], Iterable[Float]]) -> None:
    header = _header(length)
    file.seek(0)
    if file.read(len(header)) != header:  # new, or torn in its first bytes
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
    """How numpy begins the file of a float32 array [length]."""
    text = io.BytesIO()
    what = {"descr": "<f4", "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(text, what)
    return text.getvalue()
