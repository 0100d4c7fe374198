"""A model from the hub: downloaded into the hub's cache, which keeps complete files, and compared."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blt.checkpoint import hub
from blt.files import naming
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.errors import HubError

CHECKPOINT = ("README.md", "*.json", "*.safetensors", hub.WEIGHTS)
"""Names in the root of a repository."""
LINKED = 1 << 20
"""Files of at least so many bytes are hard links into the hub's cache, where that is in the same file system."""


@dataclass(frozen=True)
class Pulled:
    """A downloaded model: the folder in the hub's cache, the commit, and the names of its files."""

    folder: Path
    commit: str
    files: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.files)


def pull(name: str, *, checkpoint: bool = True, bundle: bool = True, revision: str | None = None) -> Pulled:
    """Downloads the checkpoint, the bundle or both (what the repository has of them), and compares all checksums.

    At least one of both is asked for. The folder of a bundle alone is that of the bundle. Raises
    BundleError, and HubError, also for a damaged file, which is removed from the cache.
    """
    library = hub.library("downloading needs huggingface_hub, which")
    with hub.failures(f"{name}: "):
        commit = revision
        if checkpoint:
            root = Path(
                library.snapshot_download(
                    name, revision=commit, allow_patterns=list(CHECKPOINT), ignore_patterns=["*/*"]
                )
            )
            commit = root.name
        if bundle:
            root = Path(library.snapshot_download(name, revision=commit, allow_patterns=[f"{hub.BUNDLE}/*"]))
    has_bundle = bundle and (root / hub.BUNDLE / "manifest.json").exists()
    has_weights = checkpoint and any(_weights(root))
    if not (has_bundle or has_weights):
        wanted = " and no ".join([*(["checkpoint"] if checkpoint else []), *(["bundle"] if bundle else [])])
        raise HubError(f"{name} has no {wanted} of this project")
    folder = root if checkpoint else root / hub.BUNDLE
    files = tuple(sorted(_files(folder, with_bundle=has_bundle, with_root=checkpoint)))
    for file in files:
        _check_blob(folder / file, name)
    if has_bundle:
        Bundle.open(root / hub.BUNDLE, verify="full")
    return Pulled(folder, root.name, files)


def _weights(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if path.name == hub.WEIGHTS or path.suffix == ".safetensors")


def _files(folder: Path, *, with_bundle: bool, with_root: bool) -> Iterator[str]:
    """The names of the files that a pull asks for; the cache may hold more."""
    if not with_root:
        yield from (path.name for path in folder.iterdir() if path.is_file())
        return
    yield from (path.name for path in folder.iterdir() if path.is_file() and any(map(path.match, CHECKPOINT)))
    if with_bundle:
        yield from (f"{hub.BUNDLE}/{path.name}" for path in (folder / hub.BUNDLE).iterdir() if path.is_file())


def _check_blob(path: Path, name: str) -> None:
    """Compares a file with its name in the cache: its sha256, or that of a git object. Removes it if they differ."""
    blob = path.resolve()
    expected = blob.name
    with blob.open("rb") as file:
        if len(expected) == 64:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        elif len(expected) == 40:
            found = hashlib.sha1(b"blob %d\0" % blob.stat().st_size + file.read(), usedforsecurity=False).hexdigest()
        else:  # a cache without links, or an etag that is no checksum
            return
    if found != expected:
        blob.unlink()
        path.unlink(missing_ok=True)
        raise HubError(f"{name}: {path.name} was damaged in transit (its checksum differs) and is removed; pull again")


def copy(pulled: Pulled, target: Path) -> None:
    """Writes the files as a real folder into `target`, an empty folder. Large files are hard links if possible."""
    for name in pulled.files:
        source, copied = (pulled.folder / name).resolve(), target / name
        copied.parent.mkdir(exist_ok=True)
        with naming(copied):
            if source.stat().st_size < LINKED or not _linked(source, copied):
                shutil.copyfile(source, copied)


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        return False
    return True
