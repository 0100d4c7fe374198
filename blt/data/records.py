"""Documents, and how records (JSONL lines, parquet rows) become documents.

A record has a text, or a prompt and its completion. Then the document is the prompt followed directly by the
completion, and only the completion carries loss.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from blt.data.compressed import MAX_MEMORY
from blt.data.long_lines import LongLine
from blt_runtime.errors import InputError, UsageError

ONE_PER_LINE = "write one object per line (JSONL), or read the file as text by `blt data prepare --format txt`"
CHUNK_BYTES = 1 << 20
LONG_BYTES = 1 << 25
"""A longer document is kept in a file."""
LONG_LINE = 1 << 23
"""A longer line of JSON is read in blocks."""


class Spilled:
    """A document that is too long for memory, in a temporary file without a name. `append` adds to its end."""

    def __init__(self, folder: Path):
        self._folder, self._file = folder, tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed with the object)
        self.size = 0

    def append(self, content: bytes) -> None:
        self._file.write(content)
        self.size += len(content)

    def chunks(self, start: int, stop: int) -> Iterator[bytes]:
        self._file.flush()
        while start < stop and (chunk := os.pread(self._file.fileno(), min(CHUNK_BYTES, stop - start), start)):
            yield chunk
            start += len(chunk)

    def cut(self, at: int) -> Spilled:
        """Removes the end from `at` on, and returns it."""
        end = Spilled(self._folder)
        for chunk in self.chunks(at, self.size):
            end.append(chunk)
        self._file.truncate(at)
        self.size = at
        return end


class Document(NamedTuple):
    """The bytes of a document; the first `prompt` of them carry no loss. A `spilled` one has no `content`."""

    content: bytes
    prompt: int = 0
    spilled: Spilled | None = None

    @property
    def size(self) -> int:
        return len(self.content) if self.spilled is None else self.spilled.size

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` to `stop`, in one piece or in pieces of CHUNK_BYTES."""
        if self.spilled is None:
            yield self.content[start:stop]
        else:
            yield from self.spilled.chunks(start, self.size if stop is None else stop)


class Growing:
    """A document that grows block by block: joined once, or in a file of `folder` once it is longer than LONG_BYTES."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._blocks: list[bytes] = []
        self._size = 0
        self._spilled: Spilled | None = None

    def append(self, block: bytes) -> None:
        self._blocks.append(block)
        self._size += len(block)
        if self._folder is not None and self._size > LONG_BYTES:
            self._spilled = self._spilled or Spilled(self._folder)
            self._spill()

    def finish(self) -> Document:
        """The document; the next `append` begins another one."""
        if self._spilled is not None:
            self._spill()
        document = Document(b"".join(self._blocks), spilled=self._spilled)
        self._blocks, self._size, self._spilled = [], 0, None
        return document

    def _spill(self) -> None:
        assert self._spilled is not None
        for block in self._blocks:
            self._spilled.append(block)
        self._blocks, self._size = [], 0


@dataclass(frozen=True)
class Fields:
    """The keys of a record: of its text, or of prompt and completion. `a.b` is the key b of the object under a, unless
    the record has a key `a.b`. Raises UsageError for one of these two."""

    text: str = "text"
    prompt: str | None = None
    completion: str | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.completion is None):
            raise UsageError("--prompt-field and --completion-field belong together; give both")

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that are read."""
        return (self.text,) if self.prompt is None or self.completion is None else (self.prompt, self.completion)

    def option(self, key: str) -> str:
        """The option that names a key."""
        if self.prompt is None:
            return "--text-field"
        return "--prompt-field" if key == self.prompt else "--completion-field"

    def no_text(self, key: str, where: str) -> InputError:
        """The error to raise for a record without a string under `key`. `where` names the record."""
        return InputError(f"{where}: no text under the key {key!r}; name the right key with {self.option(key)}")

    def document(self, texts: list[bytes]) -> Document:
        """The document of the texts under `keys`."""
        return Document(b"".join(texts), len(texts[0]) if len(texts) > 1 else 0)

    def paths(self, key: str) -> tuple[tuple[str, ...], ...]:
        """Where a key's value may be: under the key itself, or else under its parts."""
        return ((key,), tuple(key.split("."))) if "." in key else ((key,),)


class Notes:
    """Counts of records that were skipped or changed, and the first of each kind. Threads may share it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, what: str, where: str) -> None:
        with self._lock:
            self.counts[what] += 1
            self.first.setdefault(what, where)


@dataclass(frozen=True)
class Reading:
    """How files are read.

    strict: a null text and invalid UTF-8 are errors; otherwise they are counted in `notes`.  max_memory: bytes that a
    decompressor's window or a row of parquet may need.  spill: the folder for documents that are too long for
    memory; None keeps all of them in memory.
    """

    fields: Fields = Fields()
    strict: bool = False
    max_memory: int = MAX_MEMORY
    spill: Path | None = None
    notes: Notes = field(default_factory=Notes)

    def note(self, what: str, where: str) -> None:
        """Counts a record. Raises InputError if `strict`."""
        if self.strict:
            raise InputError(f"{where}: {what}; correct it, or leave out --strict")
        self.notes.add(what, where)


NULL = "null text"
NOT_UTF8 = "invalid UTF-8"
WHAT_IS_DONE = {NULL: "skipped", NOT_UTF8: "taken as bytes"}


def read_jsonl(lines: BinaryIO, path: Path, reading: Reading) -> Iterator[Document]:
    """One document per line that is not blank. Raises InputError with the number of the line.

    A file with one JSON value over several lines fails at its first line.
    """
    number = 0
    names = {name for key in reading.fields.keys for name in (key, *key.split("."))}
    quoted = [json.dumps(name, ensure_ascii=False).encode() for name in names]
    while line := lines.readline(LONG_LINE + 1):
        number += 1
        where = f"{path}:{number}"
        if len(line) > LONG_LINE:
            document = _long_record(line, lines, reading, where)
            if document is not None:
                yield document
        elif line.strip():
            record = _record(line, where)
            if any(line.count(name) > 1 for name in quoted):
                _check_unique(line, names, where)
            texts = _texts(record, reading, where)
            if texts is not None:
                yield reading.fields.document(texts)


def _long_record(begin: bytes, lines: BinaryIO, reading: Reading, where: str) -> Document | None:
    """The document of a line of any length, which begins with `begin`; None if a text is null."""
    fields = reading.fields
    paths = [path for key in fields.keys for path in fields.paths(key)]
    try:
        found = LongLine(begin, lines).read(paths, lambda: Growing(reading.spill))
    except ValueError as error:
        raise InputError(f"{where}: not a JSON object ({error}); {ONE_PER_LINE}") from error
    texts: list[Document] = []
    for key in fields.keys:
        value = next((found[path] for path in fields.paths(key) if path in found), "missing")
        if value is None:
            reading.note(NULL, where)
            return None
        if not isinstance(value, Growing):
            raise fields.no_text(key, where)
        texts.append(value.finish())
    if len(texts) == 1:
        return texts[0]
    whole = Growing(reading.spill)
    for text in texts:
        for chunk in text.chunks():
            whole.append(chunk)
    return whole.finish()._replace(prompt=texts[0].size)


def _record(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # brackets a thousand deep
        raise InputError(f"{where}: not a JSON object ({error}); {ONE_PER_LINE}") from error
    if not isinstance(record, Mapping):
        raise InputError(f"{where}: a JSON {type(record).__name__}, not an object; {ONE_PER_LINE}")
    return record


def _check_unique(line: bytes, names: set[str], where: str) -> None:
    """Raises InputError if an object has one of these keys twice. A line where each occurs once needs no check."""

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, n in Counter(key for key, _ in pairs if key in names).items() if n > 1]
        if twice:
            raise InputError(f"{where}: the key {twice[0]!r} occurs twice in one object")
        return dict(pairs)

    json.loads(line, object_pairs_hook=check)


def _texts(record: Mapping[str, Any], reading: Reading, where: str) -> list[bytes] | None:
    """The texts of a record in UTF-8; None if one is null."""
    texts: list[bytes] = []
    for key in reading.fields.keys:
        value = _value(record, key)
        if value is None:
            reading.note(NULL, where)
            return None
        if not isinstance(value, str):
            raise reading.fields.no_text(key, where)
        # A lone surrogate cannot be encoded; it is dropped, as the tokenizer does (spec section 1).
        texts.append(value.encode("utf-8", errors="ignore"))
    return texts


_MISSING = object()


def _value(record: Any, key: str) -> Any:
    """The value of a key, or of a path of keys; null for a path through null; an object without meaning if missing."""
    if key in record:
        return record[key]
    for name in key.split("."):
        if record is None:
            return None
        record = record.get(name, _MISSING) if isinstance(record, Mapping) else _MISSING
    return record
