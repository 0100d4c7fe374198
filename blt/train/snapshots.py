"""Training checkpoints: one file per step, written atomically, the newest few kept, a damaged newest one skipped."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from blt.tensors import atomic_save, read_tensors
from blt_runtime.errors import CheckpointError

FORMAT, VERSION = "blt-train", 1
log = logging.getLogger("blt.train")


def write(folder: Path, step: int, content: dict[str, Any], keep: int) -> Path:
    """Saves `content` as the snapshot of `step` and removes all but the newest `keep`, and what kills left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".step-*.part"):
        stale.unlink(missing_ok=True)
    path = folder / f"step-{step:08d}.pt"
    atomic_save(path, {"format": FORMAT, "version": VERSION, "step": step, **content})
    for old in snapshots(folder)[:-keep]:
        old.unlink()
    return path


def snapshots(folder: Path) -> list[Path]:
    """Snapshot files, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def read(path: Path) -> dict[str, Any]:
    """One snapshot. Raises CheckpointError."""
    content = read_tensors(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a training checkpoint; give a file step-*.pt or a run folder")
    if content["version"] > VERSION:
        raise CheckpointError(f"{path} was written by a newer version (format {content['version']}); upgrade")
    return content


def read_newest(folder: Path) -> dict[str, Any] | None:
    """The newest snapshot that can be read, None if there are none. Warns about each that cannot."""
    found = snapshots(folder)
    for path in reversed(found):
        try:
            return read(path)
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
    if found:
        raise CheckpointError(f"{folder}: no checkpoint can be read; start anew in another output folder")
    return None
