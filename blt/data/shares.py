"""Chooses the split of every document: by the names of files and folders, else by a hash of its content.

Held-out text (valid, test) never becomes training text, unless names are ignored on request. Few documents may all have
the same split by their hashes. Then a document moves to each empty split whose share is not zero. If there is only one
document, its end is cut off for the split.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from blt.data.inputs import Source
from blt.data.records import Document
from blt.data.splits import SHARES, SPLITS, check_shares
from blt_runtime.errors import InputError

HELD_BYTES = 64 << 20
"""Documents are held back until every share has one, up to this size."""
SHORTEST_CUT = 256
"""Bytes that are cut off a document at least. At least three times as many are left."""
log = logging.getLogger("blt.data")
Placed = tuple[str, Source, Document]


def assign(
    sources: Sequence[Source], split: Sequence[float] | None, ignore_names: bool = False
) -> tuple[list[Source], tuple[float, ...]]:
    """The sources with their final splits (None: a hash of each document decides), and the shares for the hash.

    split: None leaves files named `train` whole; shares also cut them.  Files named valid or test keep their split
    unless `ignore_names`. Raises UsageError for bad shares, and InputError if the names leave a file's split open.
    """
    shares = check_shares(SHARES if split is None else split)
    if ignore_names:
        return [replace(source, split=None) for source in sources], shares
    held_out = [source for source in sources if source.split in ("valid", "test")]
    train = [source for source in sources if source.split == "train"]
    others = [source for source in sources if source.split is None]
    if not train and not held_out:
        return list(sources), shares
    if not train and not others:
        raise InputError(
            f"every input is named as held-out text ({_some(held_out)}), so no text is left to train on; rename it, or "
            "split all text by a hash with --ignore-names"
        )
    if split is None and train and others:
        raise InputError(
            f"{_some(train)}: named train; {_some(others)}: without a split in the name, so it may be held-out text; "
            "name all inputs, give --split 98/1/1 to split everything that is not named valid or test, or "
            "--ignore-names"
        )
    named = {source.split for source in held_out}
    shares = tuple(0.0 if name in named else share for name, share in zip(SPLITS, shares, strict=True))
    hashed = others if split is None else [*train, *others]
    _report(sources, hashed, shares)
    final = [replace(s, split=None) if split is not None and s.split == "train" else s for s in sources]
    return final, shares


def _report(sources: Sequence[Source], hashed: Sequence[Source], shares: Sequence[float]) -> None:
    for name in SPLITS:
        files = [source for source in sources if source.split == name and source not in hashed]
        if files:
            log.info("%s: %s, by name (%s)", name, _count(files), _some(files))
    if hashed:
        cut = [name for name, share in zip(SPLITS, shares, strict=True) if share]
        log.info("%s: %s, by a hash of each document (%s)", "/".join(cut), _count(hashed), _some(hashed))


def _count(files: Sequence[Source]) -> str:
    return f"{len(files)} file{'s' if len(files) > 1 else ''}"


def _some(sources: Sequence[Source]) -> str:
    return ", ".join(str(source.path) for source in sources[:2]) + (", ..." if len(sources) > 2 else "")


class _Held(NamedTuple):
    source: Source
    document: Document
    point: int


def place(found: Iterable[tuple[Source, Document]], shares: Sequence[float], seed: int) -> Iterator[Placed]:
    """(split, source, document) of all documents, in order within each split.

    shares: of train, valid and test. Equal documents, and records with the same prompt, are in one split, and the order
    of the documents does not matter.
    """
    wanted = [name for name, share in zip(SPLITS, shares, strict=True) if share]
    splits: dict[int, str] = {}
    held: list[_Held] | None = []
    size = 0
    for source, document in found:
        if source.split is not None:
            yield source.split, source, document
            continue
        point = _point(document, seed)
        if held is None:
            yield splits.get(point) or _split_at(point, shares), source, document
            continue
        held.append(_Held(source, document, point))
        size += len(document.content)
        splits[point] = _split_at(point, shares)
        if size > HELD_BYTES or len(set(splits.values())) == len(wanted):
            yield from _balanced(held, splits, wanted, shares)
            held = None
    yield from _balanced(held or [], splits, wanted, shares)


def _point(document: Document, seed: int) -> int:
    """A 64-bit hash of the prompt, or of the whole document without one."""
    digest = hashlib.sha256(seed.to_bytes(8, "little", signed=True))
    for chunk in document.chunks(0, document.prompt or None):
        digest.update(chunk)
    return int.from_bytes(digest.digest()[:8], "little")


def _split_at(point: int, shares: Sequence[float]) -> str:
    at = point / 2**64 * sum(shares)
    return SPLITS[0] if at < shares[0] else SPLITS[1] if at < shares[0] + shares[1] else SPLITS[2]


def _balanced(
    held: list[_Held], splits: dict[int, str], wanted: list[str], shares: Sequence[float]
) -> Iterator[Placed]:
    """The held documents with a document, or a cut of one, in every wanted split. `splits` is changed accordingly."""
    if not held:
        return
    for name in wanted:
        if name not in splits.values():
            _move_one(splits, name)
    placed = [(splits[point], source, document) for source, document, point in held]
    for name in reversed(wanted):
        if name not in splits.values():
            _cut_one(placed, name, shares[SPLITS.index(name)] / sum(shares))
    yield from placed


def _move_one(splits: dict[int, str], name: str) -> None:
    """Moves the point nearest to the split `name` there, from the split with most points; it keeps at least one, except
    for train."""
    points: dict[str, list[int]] = defaultdict(list)
    for point, split in splits.items():
        points[split].append(point)
    donor = max(points, key=lambda split: len(points[split]))
    if len(points[donor]) > 1 or name == "train":
        nearest = max if SPLITS.index(donor) < SPLITS.index(name) else min
        splits[nearest(points[donor])] = name


def _cut_one(placed: list[Placed], name: str, share: float) -> None:
    """Cuts the end off the longest document of train, if it is long enough."""
    whole = [i for i, (split, _, document) in enumerate(placed) if split == "train" and not document.prompt]
    longest = max(whole, key=lambda i: placed[i][2].size, default=None)
    if longest is None or placed[longest][2].size < 4 * SHORTEST_CUT:
        return
    _, source, document = placed[longest]
    at = _boundary(document, min(math.ceil(document.size * (1 - share)), document.size - SHORTEST_CUT))
    if document.spilled is None:
        rest, end = Document(document.content[:at]), Document(document.content[at:])
    else:
        rest, end = document, Document(b"", spilled=document.spilled.cut(at))
    log.info(
        "%s: the last %s bytes of a document of %s, as there are too few documents", name, f"{end.size:,}", source.path
    )
    placed[longest] = ("train", source, rest)
    placed.append((name, source, end))


def _boundary(document: Document, at: int) -> int:
    """The end of a line, a word or a character soon after `at`."""
    near = b"".join(document.chunks(at, min(document.size, at + SHORTEST_CUT // 2)))
    for end in (b"\n", b" "):
        if end in near:
            return at + near.index(end) + 1
    return at + next((i for i, byte in enumerate(near[:4]) if byte & 0xC0 != 0x80), 0)
