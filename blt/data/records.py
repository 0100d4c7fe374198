"""Documents, and how records (JSONL lines, parquet rows) become documents.

A record has a text, or a prompt and its completion. Then the document is the prompt followed directly by the
completion, and only the completion carries loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from blt_runtime.errors import InputError, UsageError

ONE_PER_LINE = "write one object per line (JSONL), or read the file as text by `blt data prepare --format txt`"


class Document(NamedTuple):
    """The bytes of a document; the first `prompt` of them carry no loss."""

    content: bytes
    prompt: int = 0


@dataclass(frozen=True)
class Fields:
    """The keys of a record: of its text, or of prompt and completion. Raises UsageError for one of these two."""

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

    def document(self, record: Any, where: str) -> Document:
        """The document of one record. `where` names it in errors. Raises InputError for a key without text."""
        if self.prompt is None or self.completion is None:
            return Document(_text(record, self.text, "--text-field", where))
        prompt = _text(record, self.prompt, "--prompt-field", where)
        return Document(prompt + _text(record, self.completion, "--completion-field", where), len(prompt))


def read_jsonl(lines: BinaryIO, path: Path, fields: Fields) -> Iterator[Document]:
    """One document per line that is not blank. Raises InputError with the number of the line.

    A file with one JSON value over several lines fails at its first line.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # brackets a thousand deep
            raise InputError(f"{where}: not a JSON object ({error}); {ONE_PER_LINE}") from error
        if not isinstance(record, Mapping):
            raise InputError(f"{where}: a JSON {type(record).__name__}, not an object; {ONE_PER_LINE}")
        yield fields.document(record, where)


def _text(record: Any, key: str, option: str, where: str) -> bytes:
    text = record.get(key) if isinstance(record, Mapping) else None
    if isinstance(text, bytes):  # parquet has columns of bytes
        return text
    if not isinstance(text, str):
        raise InputError(f"{where}: no text under the key {key!r}; name the right key with {option}")
    # A lone surrogate cannot be encoded; it is dropped, as the tokenizer does (spec section 1).
    return text.encode("utf-8", errors="ignore")
