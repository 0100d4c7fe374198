"""Putting a finished folder in place of an older one. Standard library only: data preparation needs no torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


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
