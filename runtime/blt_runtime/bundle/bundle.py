"""A bundle on disk: a folder that describes itself. Only the files that the manifest lists are read.

Every listed file must be a plain file in the folder, of the listed size. sha256 is checked for small bundles and small
files by default, and for everything with verify="full". No pickle is read, and no path leaves the folder. Other entries
of the folder (a README, `.gitattributes`, what a desktop leaves) are ignored.

Links are refused, with one exception: the Hugging Face cache stores a repository as `snapshots/REV/NAME`, a link to a
plain file in `blobs` of the same repository.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

from .. import reading
from ..errors import BundleError, UsageError, shown
from ..hashing import TABLE_DTYPES, stored_width
from ..reading import in_hub_cache
from . import manifest as manifests
from .manifest import FileEntry, FileRef, Manifest

Verify = Literal["auto", "full", "sizes"]
HASH_WHOLE_BUNDLE = 1 << 30
HASH_FILE = 16 << 20
HASH_AT_ONCE = 2
ENGINES_FILE = "engines.json"
"""In a folder of engines (`bundle.engines`), beside the manifest of its bundle."""
_AGAIN = "copy or export the bundle again"
_LINK = "{} in {} is a link out of the bundle: replace it by the file (cp -rL copies a folder without links)"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle folder.

    Example:
        bundle = Bundle.open("bundle", verify="full")
        print(bundle.manifest.precision)
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path, verify: Verify = "auto") -> Bundle:
        """Reads and verifies the bundle in the folder `path`.

        verify: "sizes" compares sizes only; "auto" also sha256, of everything in bundles up to 1 GiB and
        else of files up to 16 MiB; "full" of everything. Raises BundleError.
        """
        if not isinstance(path, str | Path):
            raise UsageError(f"the path of a bundle must be a str or a Path, not {shown(path)}")
        if not isinstance(verify, str) or verify not in ("auto", "full", "sizes"):
            raise UsageError(f"verify must be 'auto', 'full' or 'sizes', not {shown(verify)}")
        folder = Path(path)
        try:
            reason = "it is a file, not a folder" if folder.exists() else "there is no such folder"
            is_folder = folder.is_dir()
        except OSError as error:  # such as a name that is too long
            raise BundleError(f"{shown(str(folder))} is not a bundle: {error.strerror}") from error
        if not is_folder:
            raise BundleError(f"{folder} is not a bundle: {reason}")
        if not os.path.lexists(folder / manifests.FILE_NAME):
            raise BundleError(f"{folder} is not a bundle: it has no {manifests.FILE_NAME}")
        if os.path.lexists(folder / ENGINES_FILE):
            raise BundleError(f"{folder} holds TensorRT engines: give the bundle that they were built from")
        check_plain(folder / manifests.FILE_NAME)
        bundle = cls(folder, manifests.read(folder / manifests.FILE_NAME))
        bundle._verify(verify)
        bundle.hash_tables()  # reads the header only, to find a table of another shape or type now
        return bundle

    def graph_file(self, group: str) -> Path:
        """Path of a graph's ONNX file. Raises UsageError for a graph that the bundle does not have."""
        return self._file("graph", group, self.manifest.graphs)

    def row_graph_file(self, group: str) -> Path:
        """Path of a batched graph's ONNX file. Raises UsageError if the bundle has none."""
        return self._file("batched graph", group, self.manifest.row_graphs)

    def resident_graph_file(self, group: str) -> Path:
        """Path of a graph's ONNX file for devices. Raises UsageError if the bundle has none."""
        return self._file("graph for devices", group, self.manifest.resident_graphs)

    def table_graph_file(self) -> Path:
        """Path of the encoder that gathers from hash tables on a device. Raises UsageError if the bundle has none."""
        if self.manifest.table_graph is None:
            raise UsageError(
                f"{self.path} has no graph for hash tables on a device: export the flavour cuda, with hash tables of "
                "float32, float16 or bfloat16"
            )
        return self.path / self.manifest.table_graph.file

    def _file(self, kind: str, group: str, graphs: Mapping[str, FileRef]) -> Path:
        if not isinstance(group, str) or group not in graphs:
            raise UsageError(f"the bundle has no {kind} {shown(group)}; it has: {', '.join(graphs) or 'none'}")
        return self.path / graphs[group].file

    def hash_tables(self) -> dict[str, npt.NDArray[Any]]:
        """The hash tables of each graph that has some, as stored, memory-mapped read-only: [tables * rows, stored
        width] of all its tables.

        bfloat16 is stored as uint16, int8 with a scale after each row (`blt_runtime.hashing`). Raises BundleError.
        """
        return {name: self._tables(name, ref.file) for name, ref in self.manifest.tables.items()}

    def _tables(self, graph: str, file: str) -> npt.NDArray[Any]:
        spec = self.manifest.spec.hashes[graph]
        try:
            tables = reading.read_array(self.path / file, mapped=True)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOMEM:  # no address space to map it to
                raise MemoryError(file) from error
            raise BundleError(f"{file} is not an array file: export the bundle again") from error
        shape = (spec.tables * spec.rows, stored_width(spec.dim, spec.dtype))
        if tables.shape != shape:
            raise BundleError(f"{file} does not have the shape that the manifest lists")
        if tables.dtype != (stored := TABLE_DTYPES[spec.dtype]) or not tables.flags.c_contiguous:
            found = f"{tables.dtype} by {'rows' if tables.flags.c_contiguous else 'columns'}"
            raise BundleError(
                f"{file} holds {found}, but {spec.dtype} tables are {stored} by rows: export the bundle again"
            )
        mapped: Any = tables.base
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)  # scattered rows: reading ahead would fetch the whole file
        return tables

    def _verify(self, verify: Verify) -> None:
        entries = self.manifest.files
        for path in self.path.iterdir():
            if path.is_symlink() and not in_hub_cache(path):  # also an unlisted one: a graph may name it
                raise BundleError(_LINK.format(path.name, self.path))
        for name, entry in entries.items():
            check_file(self.path / name, entry)
        if verify == "sizes":
            return
        everything = verify == "full" or sum(e.bytes for e in entries.values()) <= HASH_WHOLE_BUNDLE
        checked = [(self.path / name, e) for name, e in entries.items() if everything or e.bytes <= HASH_FILE]
        checked.sort(key=lambda item: -item[1].bytes)  # the largest first: both threads finish at about the same time
        with ThreadPoolExecutor(HASH_AT_ONCE) as pool:
            for _ in pool.map(lambda item: check_content(*item), checked):
                pass


def entry_of(path: Path) -> FileEntry:
    """Size and sha256 of a file, as the manifest lists it."""
    return FileEntry(path.stat().st_size, _sha256(path))


def is_bundle(folder: Path) -> bool:
    """Whether the folder's manifest.json is a bundle's; other folders of the project have a manifest.json too."""
    if os.path.lexists(folder / ENGINES_FILE):
        return False
    try:
        check_plain(folder / manifests.FILE_NAME)
        return manifests.is_bundle_manifest(folder / manifests.FILE_NAME)
    except BundleError:
        return False


def check_plain(path: Path, advice: str = _AGAIN) -> os.stat_result:
    """Size and times of a bundle's file. Raises BundleError unless it is a plain file or a link in a hub cache. advice:
    the end of the message about a missing file."""
    try:
        info = path.lstat()
        if stat.S_ISLNK(info.st_mode):
            if not in_hub_cache(path):
                raise BundleError(_LINK.format(path.name, path.parent))
            info = path.stat()
    except OSError as error:
        raise BundleError(f"{path.name} is missing in {path.parent}: {advice}") from error
    if not stat.S_ISREG(info.st_mode):
        raise BundleError(f"{path.name} in {path.parent} is not a plain file")
    return info


def check_file(path: Path, entry: FileEntry, advice: str = _AGAIN) -> None:
    """Raises BundleError unless `path` is a plain file of the listed size. advice: the end of the message."""
    info = check_plain(path, advice)
    if info.st_size != entry.bytes:
        raise BundleError(f"{path.name} has {info.st_size} bytes instead of {entry.bytes}: {advice}")


def check_content(path: Path, entry: FileEntry, advice: str = _AGAIN) -> None:
    """Raises BundleError unless the file has the listed sha256. advice: the end of the message."""
    if _sha256(path) != entry.sha256:
        raise BundleError(f"{path.name} was changed (its sha256 differs): {advice}")


def _sha256(path: Path) -> str:
    try:
        with reading.open_plain(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
