"""Finds the files to read, and what each of them is: by its first bytes and its name.

A file that is not text is refused unless the format is forced. All refused files are named in one error.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import NamedTuple

from blt.data.compressed import MAX_MEMORY, SUFFIXES, open_bytes
from blt.data.dataset import is_data_folder
from blt.data.magic import HEAD_BYTES, PARQUET, compression_of, not_text
from blt.data.records import Fields
from blt.data.splits import split_by_name, splits_in
from blt.data.walk import Found, special, walk
from blt_runtime.errors import InputError, UsageError

KINDS = ("txt", "jsonl", "parquet")
FORMATS = ("auto", *KINDS, "dir")
GROUP_BY = ("auto", "file", "folder")
FILE_GROUPS = 20
"""With `--group-by auto`, the most groups that are named after files."""
SHOWN = 10
"""Files named in one message."""
_KIND_OF = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_ABOUT_DATA = re.compile(
    r"(readme|licen[cs]e|copying|notice|authors|contributing|changelog|changes|citation|dataset_?card|dataset_?infos?"
    r"|checksums?|(md5|sha1|sha256|sha512)sums?)([-_.].*)?|_success|.*\.(md5|sha1|sha256|sha512|crc)",
    re.IGNORECASE,
)
"""Names of files that describe a data set and are not part of it."""
log = logging.getLogger("blt.data")


@dataclass(frozen=True)
class Source:
    """One file to read.

    split: the split that its name or a folder's selects, or None.  compression: as `magic.compression_of` names it.
    folder: its group if groups are folders.
    """

    path: Path
    group: str
    format: str
    split: str | None = None
    compression: str | None = None
    folder: str = ""


class Refused(NamedTuple):
    """Why a file is not read. not_text: it could be, as bytes."""

    text: str
    not_text: bool = False


def find_sources(
    inputs: Sequence[str | Path],
    format: str = "auto",
    fields: Fields | None = None,
    *,
    group_by: str = "auto",
    ignore_names: bool = False,
    strict: bool = False,
    max_memory: int = MAX_MEMORY,
) -> list[Source]:
    """The files of `inputs`, sorted within each folder. What is left out of a folder is logged.

    group_by: what groups are named after: the file, its folder, or (auto) the folder if there are more than
    FILE_GROUPS files.  ignore_names: names decide no split.  strict: entries that cannot be read are errors.

    Raises UsageError for wrong arguments (also for prompt `fields` if a file is plain text), and InputError for inputs
    that are not text or cannot be read; it names them all.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")
    if group_by not in GROUP_BY:
        raise UsageError(f"--group-by {group_by}: use one of {', '.join(GROUP_BY)}")
    if not inputs:
        raise UsageError("no input: name at least one file or folder")
    paths = [Path(path) for path in inputs]
    sources: list[Source] = []
    refused: list[tuple[Path, Refused]] = []
    root = _common_parent(paths)
    for path in paths:
        files, unreadable = _files(path, format, strict)
        refused += [(entry, Refused(reason)) for entry, reason in unreadable]
        for file in files:
            place = PurePath(os.path.relpath(file, root) if root else file.relative_to(path) if file != path else "")
            found = _source(file, place, path, format, ignore_names, max_memory)
            if isinstance(found, Refused):
                refused.append((file, found))
            else:
                sources.append(found)
    if refused:
        raise InputError(_refusal(refused, len(sources)))
    if not sources:
        raise InputError(f"{inputs[0]}: the folder holds no files")
    plain = [source.path for source in sources if source.format == "txt"]
    if plain and fields is not None and fields.prompt is not None:
        raise UsageError(f"{plain[0]} is read as text, which has no --prompt-field; give only JSONL or parquet files")
    return _grouped(sources, group_by)


def _common_parent(paths: Sequence[Path]) -> str | None:
    """The parent of all inputs if there are several: only names below it select splits."""
    return os.path.commonpath([path.absolute().parent for path in paths]) if len(paths) > 1 else None


def _files(path: Path, format: str, strict: bool) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The files of one input, and those of its entries that cannot be read with the reason. Logs what is left out."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        if path.is_symlink():
            raise UsageError(f"{path} is a link that leads to no file or folder ({error})") from None
        raise UsageError(f"{path}: no such file or folder") from None
    kind = special(status.st_mode)
    if kind is not None:
        raise UsageError(f"{path} is {kind}; write its content to a file first")
    if not path.is_dir():
        if format == "dir":
            raise UsageError(f"{path} is a file; --format dir reads folders")
        return [path], []
    if is_data_folder(path):
        raise UsageError(f"{path} is a data folder already; give the text that it was made from")
    found = walk(path)
    files = found.files if format == "txt" else _without_descriptions(path, found.files)
    _report(path, found)
    return files, found.unreadable + (found.left_out if strict else [])


def _without_descriptions(folder: Path, files: list[Path]) -> list[Path]:
    """Without README, LICENSE and the like, if there are files of records."""
    about = [file for file in files if _ABOUT_DATA.fullmatch(file.name)]
    data = [file for file in files if file not in set(about)] if about else files
    if not about or not any(_kind_by_name(file.name)[0] in ("jsonl", "parquet") for file in data):
        return files
    log.info("%s: left out, as it describes the data: %s", folder, _listed([str(f.relative_to(folder)) for f in about]))
    return data


def _report(folder: Path, found: Found) -> None:
    if found.hidden:
        log.info("%s: hidden entries left out: %s", folder, _listed([str(p.relative_to(folder)) for p in found.hidden]))
    if found.left_out:
        log.warning("left out: %s", _listed([f"{path} ({reason})" for path, reason in found.left_out], "; "))


def _listed(names: Sequence[str], separator: str = ", ") -> str:
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return separator.join([*names[:SHOWN], *more])


def _refusal(refused: Sequence[tuple[Path, Refused]], accepted: int) -> str:
    total = len(refused) + accepted
    begin = f"{len(refused)} of {total} files cannot be read as text: " if total > 1 else ""
    forced = (
        " (`blt data prepare --format txt` reads any content as text)" if any(r.not_text for _, r in refused) else ""
    )
    named = _listed([f"{path}: {reason.text}" for path, reason in refused], "; ")
    return f"{begin}{named}; nothing was written{forced}"


def _kind_by_name(name: str) -> tuple[str | None, str, str | None]:
    """What a file's name indicates: the kind (jsonl, parquet or None), the group and the compression."""
    compression = SUFFIXES.get(PurePath(name).suffix.lower())
    inner = PurePath(name).with_suffix("") if compression else PurePath(name)
    kind = _KIND_OF.get(inner.suffix.lower())
    known = kind is not None or inner.suffix.lower() in (".txt", ".bin")
    return kind, inner.stem if known else inner.name, compression


def _source(path: Path, place: PurePath, root: Path, format: str, ignore: bool, max_memory: int) -> Source | Refused:
    """What a file is, or why it is refused."""
    by_name, group, named_compression = _kind_by_name(path.name)
    try:
        compression, head = _head(path, max_memory)
    except InputError as error:
        if format != "txt" or not path.is_file() or not os.access(path, os.R_OK):
            return Refused(str(error).removeprefix(f"{path}: "))
        compression, head = None, b""
    if format == "txt":
        kind = "txt"
    else:
        if named_compression and compression is None:
            return Refused(f"not compressed by {named_compression}, unlike its name; is the file complete?", True)
        what = not_text(head)
        kind = (format if format in KINDS else None) or ("parquet" if what == PARQUET else by_name) or "txt"
        if what == PARQUET and kind != "parquet":
            return Refused("a parquet file; use --format parquet")
        if what == PARQUET and compression is not None:
            return Refused(f"a parquet file compressed by {compression}; decompress it first")
        if what not in (None, PARQUET):
            return Refused(f"{what}, compressed by {compression}" if compression else what, not_text=True)
        if kind == "parquet" and what is None:
            return Refused("not a parquet file, by its first bytes; is the file complete?")
    split = None if ignore or place == PurePath() else split_by_name(_uncompressed(place))
    folder = path.parent.name if path == root else _folder_name(path.relative_to(root), root)
    return Source(path, group, format=kind, split=split, compression=compression, folder=folder)


def _uncompressed(place: PurePath) -> PurePath:
    return place.with_suffix("") if SUFFIXES.get(place.suffix.lower()) and place.stem else place


def _head(path: Path, max_memory: int) -> tuple[str | None, bytes]:
    """The compression of a file, and the first bytes of its content."""
    with open_bytes(path) as file:
        head = file.read(HEAD_BYTES)
    compression = compression_of(head)
    if compression is not None:
        with open_bytes(path, compression, max_memory) as file:
            head = file.read(HEAD_BYTES)
    return compression, head


def _folder_name(inside: PurePath, root: Path) -> str:
    """The path of a file's folder in the input, without folders that are splits."""
    names = [name for name in inside.parts[:-1] if not splits_in(name)]
    return "/".join(names) or root.name or root.resolve().name


def _grouped(sources: list[Source], group_by: str) -> list[Source]:
    many = len({source.group for source in sources}) > FILE_GROUPS
    if group_by == "file" or (group_by == "auto" and not many):
        return sources
    return [replace(source, group=source.folder or source.group) for source in sources]
