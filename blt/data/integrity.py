"""Checks that shards are unchanged since they were prepared: their sha256, computed once and recorded.

A stamp file next to the data records size and modification time of every verified file, so that the next start reads
nothing. A change that preserves both is not detected there; `Dataset.verify` reads everything.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blt.files import replace_text
from blt_runtime import reading
from blt_runtime.errors import InputError

STAMPS = ".verified.json"
log = logging.getLogger("blt.data")
Stamp = list[int | str]
"""Size, modification time in ns, sha256."""


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content."""
    with reading.open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_files(folder: Path, shard: Mapping[str, Any]) -> dict[Path, str]:
    """The files of a shard with their sha256 in the manifest (an older manifest has only that of the bytes)."""
    files = {folder / f"{shard['name']}.bin": str(shard["sha256"])}
    for array, digest in shard.get("arrays", {}).items():
        files[folder / f"{shard['name']}.{array}.npy"] = str(digest)
    return files


def check(folder: Path, shards: Iterable[Mapping[str, Any]], trust_stamps: bool) -> None:
    """Compares the shards' files with the manifest. Raises InputError for one that has changed."""
    old = _read(folder) if trust_stamps else {}
    new: dict[str, Stamp] = {}
    for path, digest in (item for shard in shards for item in shard_files(folder, shard).items()):
        stamp = _stamp(path, digest)
        if old.get(path.name) != stamp and sha256_of(path) != digest:
            raise InputError(f"{path} has changed since it was prepared; run `blt data prepare` again")
        new[path.name] = stamp
    if any(old.get(name) != stamp for name, stamp in new.items()):
        _write(folder, old | new)


def _stamp(path: Path, digest: str) -> Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run `blt data prepare` again") from error
    return [status.st_size, status.st_mtime_ns, digest]


def _read(folder: Path) -> dict[str, Stamp]:
    try:
        stamps = reading.read_json(folder / STAMPS)
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def _write(folder: Path, stamps: dict[str, Stamp]) -> None:
    try:
        replace_text(folder / STAMPS, json.dumps(stamps))
    except OSError as error:  # if the folder is read-only, the next start reads the shards again
        log.debug("%s: cannot record verified files (%s)", folder, error)
