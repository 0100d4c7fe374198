"""Atomic outputs: a file or a folder appears complete or not at all. No torch: data preparation needs none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from blt_runtime.errors import UsageError


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary folder next to `out`. It becomes `out` when the block ends, and is removed if the block raises.

    Raises UsageError if the folder cannot be made. A folder left by a killed process of the same number is removed
    first: in a container, processes often have the same number.
    """
    out = out.resolve()  # a link stays; its target is replaced
    temporary = out.with_name(f".{out.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"cannot write to {temporary.parent}: {error.strerror}") from error
    try:
        yield temporary
        replace_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(finished: Path, out: Path) -> None:
    """Renames `finished` to `out`; both must be in one file system.

    An older `out` is moved aside first and restored if the renaming fails, so `out` is never incomplete.
    """
    if not out.exists():
        finished.rename(out)
        return
    old = out.parent / f".{out.name}.{os.getpid()}.old"
    out.rename(old)
    try:
        finished.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary binary file next to `path`, open for writing and reading.

    It is flushed to the disk and renamed to `path` when the block ends, and removed if the block raises.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_folder(path: Path) -> None:
    """Raises UsageError if the folder of `path` does not exist: called before the work starts."""
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} does not exist; make it first")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path next to `path`. It replaces `path` when the block ends, and is removed if the block raises."""
    check_folder(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_synced(path: Path, text: str) -> None:
    """Writes a text file and flushes it to the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Writes a text file atomically, even if the power fails."""
    temporary = path.with_name(f".{path.name}.part")
    write_synced(temporary, text)
    temporary.replace(path)
