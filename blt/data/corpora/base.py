"""`base`: about 150 MB in 62 languages (a third English, a sixth source code) made of 49 Debian 12 packages.

The lock file names the packages: version, size, sha256. Most of the text is under copyleft licences, so the recipe is
shipped and the text is not. Translations of one page share a key and a split: 2 % of the keys are test, 2 % valid.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blt.data.corpora.packages import Package, find_packages, package_files, read_lock
from blt.data.corpora.sources import CAPS, ENDS, SOURCES, Page, Source
from blt.data.corpora.text import Text

LONG = 32_000
"""Characters after which a document ends with the current paragraph, so that every group has text in every split."""
SHORT = 200
"""Characters; shorter documents are dropped."""
UNIQUE = 40
"""Characters; shorter paragraphs may repeat."""
HELD_OUT = 2
"""Percent of the keys for each of test and valid."""
log = logging.getLogger("blt.data")


def texts(debs: str | Path | None, lock: Sequence[Package] | None = None) -> tuple[Iterator[Text], dict[str, Any]]:
    """The documents, and values for the manifest about their origin. Raises UsageError and InputError for missing
    packages."""
    lock = read_lock() if lock is None else lock
    packages = find_packages(debs, lock)
    about = {"packages": {entry.package: entry.version for entry in lock}}
    return Builder().texts(packages, SOURCES), about


class Builder:
    """Makes documents of pages; keeps the paragraphs seen so far, and the size of each group and language."""

    def __init__(self) -> None:
        self.n_bytes: Counter[tuple[str, str]] = Counter()
        self._paragraphs: set[bytes] = set()

    def texts(self, packages: Mapping[str, Path], sources: Mapping[str, Source]) -> Iterator[Text]:
        """The documents of all packages, in the order of `sources`."""
        for name, source in sources.items():
            if name not in packages:
                continue
            for page in source(package_files(packages[name])):
                size = self.n_bytes[page.group, page.language] / 1e6
                if size > ENDS.get(name, float("inf")):
                    break
                if page.text.strip() and size <= _cap(page):
                    yield from self._documents(page)
            log.info("%s: %.1f MB of text so far", name, sum(self.n_bytes.values()) / 1e6)

    def _documents(self, page: Page) -> Iterator[Text]:
        for index, text in enumerate(_pieces([p for p in re.split(r"\n\s*\n", page.text) if self._is_new(p)])):
            if len(text) >= SHORT:
                content = text.encode()
                self.n_bytes[page.group, page.language] += len(content)
                split = split_of(f"{page.key}#{index}" if index else page.key)
                yield Text(split, f"{page.group}.{page.language}", content)

    def _is_new(self, paragraph: str) -> bool:
        """Whether the paragraph is new or short. Repeated paragraphs are boilerplate, or were not translated."""
        words = re.sub(r"\s+", " ", paragraph).strip()
        key = hashlib.blake2b(words.encode(), digest_size=8).digest()
        known = key in self._paragraphs
        self._paragraphs.add(key)
        return len(paragraph) <= UNIQUE or not known


def _cap(page: Page) -> float:
    return CAPS.get((page.group, page.language), CAPS.get((page.group, "*"), float("inf")))


def _pieces(paragraphs: Sequence[str]) -> Iterator[str]:
    """Joins paragraphs to pieces of at least LONG characters; the last may be shorter."""
    piece: list[str] = []
    size = 0
    for paragraph in paragraphs:
        piece.append(paragraph)
        size += len(paragraph) + 2
        if size >= LONG:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n\n".join(piece)


def split_of(key: str) -> str:
    """The split of a page, by a hash of its key."""
    point = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    return "test" if point < HELD_OUT else "valid" if point < 2 * HELD_OUT else "train"
