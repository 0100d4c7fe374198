"""Reads documents from files and folders, in an order that depends only on the inputs' names.

A text file holds documents separated by NUL bytes (so a binary file ends a document at each NUL), a JSONL file (also
`.json`) one document per line, a parquet file one per row. The group of a document is the stem of its file. A folder is
read as a whole, unless it has subfolders train, valid and test: these are the splits, and it must hold nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from blt.data.compressed import SUFFIXES, damage, open_bytes
from blt.data.dataset import is_data_folder
from blt.data.parquet import read_parquet
from blt.data.records import Document, Fields, read_jsonl
from blt_runtime.errors import InputError, UsageError

SPLITS = ("train", "valid", "test")
KINDS = ("txt", "jsonl", "parquet")
FORMATS = ("auto", *KINDS, "dir")
READ_BYTES = 1 << 22
_KIND_OF = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class Source:
    """One file to read. `split` is None if a hash of each document's content decides."""

    path: Path
    group: str
    format: str
    split: str | None


def find_sources(inputs: Sequence[str | Path], format: str = "auto", fields: Fields | None = None) -> list[Source]:
    """The files of `inputs`, sorted within each folder.

    Raises UsageError for wrong arguments (also for prompt `fields` if a file is plain text), and InputError for inputs
    that cannot be read.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")
    if not inputs:
        raise UsageError("no input: name at least one file or folder")
    sources: list[Source] = []
    for path in map(Path, inputs):
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
        if format == "dir" and not path.is_dir():
            raise UsageError(f"{path} is a file; --format dir reads folders")
        sources += _folder(path, format) if path.is_dir() else [_source(path, format, None)]
    if not sources:
        raise InputError(f"{inputs[0]}: the folder holds no files")
    plain = [source.path for source in sources if source.format == "txt"]
    if plain and fields is not None and fields.prompt is not None:
        raise UsageError(f"{plain[0]} is read as text, which has no --prompt-field; give only JSONL or parquet files")
    return sources


def _folder(folder: Path, format: str) -> list[Source]:
    if is_data_folder(folder):
        raise UsageError(f"{folder} is a data folder already; give the text that it was made from")
    splits = [name for name in SPLITS if (folder / name).is_dir()]
    others = sorted(path.name for path in folder.iterdir() if path.name not in splits and not _hidden(path, folder))
    if splits and others:
        raise InputError(
            f"{folder}: {', '.join(splits)} are its splits, so {', '.join(others[:5])} would be ignored; "
            "move it into a split, or name every input separately"
        )
    found: list[Source] = []
    roots: list[tuple[Path, str | None]] = [(folder / name, name) for name in splits]
    for root, split in roots or [(folder, None)]:
        files = sorted(path for path in root.rglob("*") if path.is_file())
        found += [_source(path, format, split) for path in files if not _hidden(path, root)]
    return found


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _source(path: Path, format: str, split: str | None) -> Source:
    name = path.name
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in SUFFIXES:
        name, suffixes = name[: -len(suffixes[-1])], suffixes[:-1]
    last = suffixes[-1] if suffixes else ""
    kind = format if format in KINDS else _KIND_OF.get(last, "txt")
    group = name[: -len(last)] if last in (".txt", ".bin", *_KIND_OF) else name
    return Source(path, group or name, kind, split)


def read_documents(source: Source, fields: Fields | None = None) -> Iterator[Document]:
    """The documents of one file without empty ones. `fields` are the keys of records."""
    fields = fields or Fields()
    found = read_parquet(source.path, fields) if source.format == "parquet" else _lines_or_text(source, fields)
    yield from (document for document in found if document.content)


def _lines_or_text(source: Source, fields: Fields) -> Iterator[Document]:
    with open_bytes(source.path) as file:
        try:
            yield from read_jsonl(file, source.path, fields) if source.format == "jsonl" else _text(file)
        except damage(source.path) as error:
            raise InputError(f"{source.path}: cannot be read to its end ({error}); is the file complete?") from error


def read_all(
    sources: Iterable[Source], fields: Fields | None = None, workers: int = 1
) -> Iterator[tuple[Source, Document]]:
    """(source, document) of all sources, in the same order for any number of `workers`.

    Workers are threads, because decompression and hashing release the interpreter lock. At most `workers` files are in
    memory.
    """
    if workers <= 1:
        for source in sources:
            for document in read_documents(source, fields):
                yield source, document
        return
    with ThreadPoolExecutor(workers) as pool:
        pending: list[tuple[Source, object]] = []
        todo = iter(sources)
        while True:
            for source in todo:
                pending.append((source, pool.submit(lambda s: list(read_documents(s, fields)), source)))
                if len(pending) >= workers:
                    break
            if not pending:
                return
            source, future = pending.pop(0)
            for document in future.result():  # type: ignore[attr-defined]
                yield source, document


def _text(file: BinaryIO) -> Iterator[Document]:
    """Documents between NUL bytes; a file without NUL is one document."""
    rest: list[bytes] = []  # joined once: a document of a gigabyte is read in hundreds of blocks
    while block := file.read(READ_BYTES):
        first, *others = block.split(b"\0")
        rest.append(first)
        if others:
            yield Document(b"".join(rest))
            yield from map(Document, others[:-1])
            rest = others[-1:]
    yield Document(b"".join(rest))
