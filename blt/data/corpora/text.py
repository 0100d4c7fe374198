"""Documents of a corpus as text files, one per split and group, documents separated by NUL."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

from blt.data.readers import SPLITS


class Text(NamedTuple):
    """A document, and where it belongs. `content` holds no NUL."""

    split: str
    group: str
    content: bytes


def write_texts(folder: Path, texts: Iterable[Text]) -> None:
    """`folder`/SPLIT/GROUP.txt for all texts, in their order."""
    files: dict[tuple[str, str], BinaryIO] = {}
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
    with ExitStack() as stack:
        for text in texts:
            key = (text.split, text.group)
            if key not in files:
                files[key] = stack.enter_context((folder / text.split / f"{text.group}.txt").open("wb"))
            files[key].write(text.content + b"\0")
