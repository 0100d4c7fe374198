"""Outputs appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blt_runtime.errors import UsageError


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
