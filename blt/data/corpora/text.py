"""Writes the documents of a corpus as text files, one per split and group, separated by NUL."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, NamedTuple

from blt.data.splits import SPLITS
from blt_runtime.errors import UsageError


class Text(NamedTuple):
    """A document with its split and group. `content` has no NUL."""

    split: str
    group: str
    content: bytes


def of_groups(texts: Iterable[Text], patterns: Sequence[str]) -> Iterator[Text]:
    """The texts whose group matches a pattern. Raises UsageError at the end for a pattern that matched no group."""
    groups: dict[str, bool] = {}
    for text in texts:
        if text.group not in groups:
            groups[text.group] = any(fnmatchcase(text.group, pattern) for pattern in patterns)
        if groups[text.group]:
            yield text
    for pattern in patterns:
        if not any(fnmatchcase(group, pattern) for group in groups):
            raise UsageError(f"--groups {pattern}: matches none of {', '.join(sorted(groups))}")


def write_texts(folder: Path, texts: Iterable[Text]) -> None:
    """Writes all texts, in order, to `folder`/SPLIT/GROUP.txt."""
    files: dict[tuple[str, str], BinaryIO] = {}
    for split in SPLITS:
        (folder / split).mkdir(parents=True)
    with ExitStack() as stack:
        for text in texts:
            key = (text.split, text.group)
            if key not in files:
                files[key] = stack.enter_context((folder / text.split / f"{text.group}.txt").open("wb"))
            files[key].write(text.content + b"\0")
