"""Atomic outputs: a file or a folder appears whole or not at all. No torch: data preparation needs none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blt_runtime.errors import UsageError


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends, and vanishes if it raises.

    Raises UsageError where none can be made. What a killed process of the same number has left is removed: in a
    container they all have the same.
    """
    out = out.resolve()  # a link stays, and what it leads to is replaced
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
    """Renames `finished` to `out`; an older `out` steps aside first and comes back if that fails, so `out` is never
    half written. Both lie in one file system."""
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


def check_folder(path: Path) -> None:
    """Raise UsageError if the folder of `path` does not exist: before the work, not behind it."""
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} does not exist; make it first")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft name beside `path`; it takes the place of `path` when the block ends without an error."""
    check_folder(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_synced(path: Path, text: str) -> None:
    """Writes a text file and flushes it to the disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Writes a whole text file or none, even if the power fails."""
    draft = path.with_name(f".{path.name}.part")
    write_synced(draft, text)
    draft.replace(path)
