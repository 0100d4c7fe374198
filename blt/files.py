"""Putting a finished folder in place of an older one. No torch: data preparation needs none."""

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
