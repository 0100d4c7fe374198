"""Reads the files of Debian packages, tar archives inside an ar archive, with the standard library.

Nothing is unpacked to disk, and no code of a package is run.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blt.data.compressed import read_zstandard
from blt.data.integrity import sha256_of
from blt_runtime.errors import InputError, UsageError

LOCK = Path(__file__).with_name("base.lock.json")
_MAGIC, _HEADER = b"!<arch>\n", 60


@dataclass(frozen=True)
class Package:
    """One entry of the lock file: the only version and content that is accepted."""

    package: str
    version: str
    size: int
    sha256: str


def read_lock(path: Path = LOCK) -> list[Package]:
    """The packages of the lock file."""
    return [Package(**entry) for entry in json.loads(path.read_text())]


def find_packages(folder: str | Path | None, lock: Sequence[Package]) -> dict[str, Path]:
    """The package files by name, after checking size and sha256.

    Raises UsageError without a folder, and InputError for packages that are missing or differ. The message has the
    command that fetches them.
    """
    if folder is None:
        raise UsageError(f"name the folder with the packages with --debs DIR; fetch them on Debian 12: {_fetch(lock)}")
    if not Path(folder).is_dir():
        raise UsageError(f"{folder}: no such folder; fetch the packages on Debian 12: {_fetch(lock, folder)}")
    present = {path.name: path for path in sorted(Path(folder).glob("*.deb"))}
    found = {entry.package: _matching(present, entry) for entry in lock}
    missing = [entry for entry in lock if found[entry.package] is None]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(lock)} packages are missing ({missing[0].package} {missing[0].version} "
            f"first); on Debian 12: {_fetch(missing, folder)} (older versions: Debian's snapshot archive)"
        )
    return {name: path for name, path in found.items() if path is not None}


def _matching(present: dict[str, Path], entry: Package) -> Path | None:
    """The file of a package. apt names it package_version_architecture.deb, with %3a for the colon of an epoch."""
    start = f"{entry.package}_{entry.version.replace(':', '%3a')}_"
    path = next((path for name, path in present.items() if name.startswith(start)), None)
    if path is not None and (path.stat().st_size != entry.size or sha256_of(path) != entry.sha256):
        raise InputError(f"{path} is not the package of the lock file (its sha256 differs); delete and fetch it again")
    return path


def _fetch(packages: Sequence[Package], folder: str | Path = "DIR") -> str:
    return f"cd {folder} && apt-get download {' '.join(f'{entry.package}={entry.version}' for entry in packages)}"


def package_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name without a leading ./, content) of the regular files in a package, in archive order. Raises InputError."""
    try:
        for name, data in _members(path):
            if name.startswith("data.tar"):
                yield from _tar_files(name, data)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise InputError(f"{path} is not a Debian package, or it is damaged ({error})") from error


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("not an ar archive")
        while len(header := file.read(_HEADER)) == _HEADER:
            name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
            yield name, file.read(size + size % 2)[:size]


def _tar_files(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    if name.endswith(".zst"):
        data = read_zstandard(io.BytesIO(data), name)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name.lstrip("./"), content.read()
