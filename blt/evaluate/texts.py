"""Text to evaluate a model on: documents of a file or a data folder, cut into pieces."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from blt_runtime.errors import InputError, UsageError
from blt_runtime.ids import encode

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

log = logging.getLogger(__name__)


class Document(NamedTuple):
    """A text and its group. The first `prompt` bytes are read and not counted. whole: the text is complete."""

    group: str
    text: bytes
    prompt: int = 0
    whole: bool = True


def documents(data: Path, split: str) -> Iterator[Document]:
    """The documents of a file, or of a split of a data folder. Raises UsageError for anything else."""
    from blt.data.dataset import Dataset, is_data_folder
    from blt.data.inputs import find_sources
    from blt.data.readers import read_all

    if not data.exists():
        raise UsageError(f"{data}: no such file or folder")
    if is_data_folder(data):
        dataset = Dataset(data)
        found = dataset.split(split)
        dataset.check(split)
        for i in range(len(found)):
            yield Document(found.group(i), found.bytes(i), int(found.prompt_lengths[i]))
        return
    if data.is_dir():
        raise UsageError(f"{data} is not a data folder; make one with blt data prepare, or give a file")
    for source, document in read_all(find_sources([data])):
        yield Document(source.group, document.content)


def limited(found: Iterable[Document], limit: int | None) -> Iterator[Document]:
    """At most `limit` bytes of each group. A document that is cut is not `whole`. Empty ones are left out."""
    used: dict[str, int] = defaultdict(int)
    for group, text, prompt, whole in found:
        kept = text if limit is None else text[: limit - used[group]]
        used[group] += len(kept)
        if kept:
            yield Document(group, kept, prompt=min(prompt, len(kept)), whole=whole and len(kept) == len(text))


class Piece(NamedTuple):
    """A prompt, the counted text after it, whether the document ends there, and the byte before the prompt (empty at
    the begin of a document)."""

    prompt: bytes
    text: bytes
    last: bool
    before: bytes = b""


def cut(document: Document, context: int) -> Iterator[Piece]:
    """The pieces of a document, of at most `context` bytes each. Those without counted text are left out."""
    _, text, prompt, whole = document
    for start in range(0, len(text), context):
        piece, last = text[start : start + context], whole and start + context >= len(text)
        read = min(max(prompt - start, 0), len(piece))
        if read < len(piece) or last:
            yield Piece(piece[:read], piece[read:], last, text[start - 1 : start] if start else b"")


def choose_split(data: Path, wanted: str | None, order: Sequence[str] = ("test", "valid", "train")) -> str:
    """`wanted`, or of a data folder the first split of `order` that holds text; another than the first is logged."""
    if wanted is not None:
        return wanted
    held = _splits_with_text(data)
    chosen = next((split for split in order if split in held), order[0])
    if chosen != order[0]:
        log.info("%s holds no text in the split %s: using %s (--split chooses)", data, order[0], chosen)
    return chosen


def _splits_with_text(data: Path) -> list[str]:
    from blt.data.dataset import Dataset, is_data_folder

    if not is_data_folder(data):
        return []
    return [name for name, split in Dataset(data).manifest["splits"].items() if split["bytes"]]


def no_text(data: Path, split: str) -> InputError:
    """The error to raise for data without text."""
    if data.is_file():
        return InputError(f"{data} is empty; give some text")
    held = _splits_with_text(data)
    instead = f"choose another with --split: {', '.join(held)}" if held else "make it again with blt data prepare"
    return InputError(f"{data} holds no text in the split {split!r}; {instead}")


def pieces(text: bytes, context: int) -> Iterator[NDArray[np.int64]]:
    """Ids of each piece: BOS, at most `context` bytes, and after the last piece EOS."""
    for start in range(0, len(text), context):
        yield encode(text[start : start + context], bos=True, eos=start + context >= len(text))


def spread(data: Path, split: str, *, context: int, most: int) -> list[NDArray[np.int64]]:
    """Pieces of `data`, spread evenly, of about `most` bytes in total; the same ones in every run.

    The data is read twice (sizes, then text), so that only the chosen pieces are in memory.
    """
    total = sum(len(document.text) for document in documents(data, split))
    if not total:
        raise no_text(data, split)
    every = -(-total // most)
    all_pieces = (piece for document in documents(data, split) for piece in pieces(document.text, context))
    return [piece for i, piece in enumerate(all_pieces) if i % every == 0]
