"""`prepare`: inputs of many kinds to one data folder, written under a hidden name and renamed when complete.

A data folder has one manifest.json, and for each split shards of raw bytes (`.bin`, documents without separators) with
the document ends (`.offsets.npy`, int64 [documents + 1]) and the documents' groups (`.groups.npy`, int32). Text made of
prompts and completions also has the prompts' lengths in bytes (`.prompts.npy`, int64 [documents]).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from blt.data.dataset import FORMAT, MANIFEST, VERSION, is_data_folder
from blt.data.integrity import sha256_of
from blt.data.readers import SPLITS, Source, find_sources, read_all
from blt.data.records import Document, Fields
from blt.files import staged
from blt_runtime.errors import InputError, UsageError

SHARD_BYTES = 256 << 20


class _SplitWriter:
    """Appends documents to the shards of one split and counts them. `prompts`: also writes the prompts' lengths."""

    def __init__(self, folder: Path, split: str, shard_bytes: int, prompts: bool = False):
        self.folder, self.split, self.shard_bytes, self.prompts = folder, split, shard_bytes, prompts
        self.shards: list[dict[str, Any]] = []
        self.groups: dict[str, dict[str, int]] = {}
        self._file: BinaryIO | None = None
        self._ends: list[int] = [0]
        self._ids: list[int] = []
        self._prompts: list[int] = []

    def add(self, document: Document, group: str, group_id: int) -> None:
        content = document.content
        if self._file is None:
            self._file = (self.folder / f"{self._stem()}.bin").open("wb")
            self._sha = hashlib.sha256()
        self._file.write(content)
        self._sha.update(content)
        self._ends.append(self._ends[-1] + len(content))
        self._ids.append(group_id)
        self._prompts.append(document.prompt)
        count = self.groups.setdefault(group, {"bytes": 0, "documents": 0})
        count["bytes"] += len(content)
        count["documents"] += 1
        if self._ends[-1] >= self.shard_bytes:
            self.close()

    def _stem(self) -> str:
        return f"{self.split}-{len(self.shards):05d}"

    def close(self) -> None:
        """Completes the current shard."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        stem = self._stem()
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "offsets": np.array(self._ends, np.int64),
            "groups": np.array(self._ids, np.int32),
        }
        shard = {"name": stem, "bytes": self._ends[-1], "documents": len(self._ids), "sha256": self._sha.hexdigest()}
        if self.prompts:
            arrays["prompts"] = np.array(self._prompts, np.int64)
            shard["prompt_bytes"] = sum(self._prompts)
        shard["arrays"] = {name: self._save(f"{stem}.{name}.npy", array) for name, array in arrays.items()}
        self.shards.append(shard)
        self._ends, self._ids, self._prompts = [0], [], []

    def _save(self, name: str, array: np.ndarray[Any, Any]) -> str:
        np.save(self.folder / name, array)
        return sha256_of(self.folder / name)

    def summary(self) -> dict[str, Any]:
        counts = ("bytes", "documents", *(["prompt_bytes"] if self.prompts else []))
        return {
            **{name: sum(shard[name] for shard in self.shards) for name in counts},
            "groups": dict(sorted(self.groups.items())),
            "shards": self.shards,
        }


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    format: str = "auto",
    split: Sequence[float] = (98, 1, 1),
    dedup: bool = False,
    text_field: str = "text",
    prompt_field: str | None = None,
    completion_field: str | None = None,
    workers: int = 1,
    seed: int = 0,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the data folder `out` and returns its manifest.

    split: shares of train, valid and test for documents that subfolders do not split. A hash of the seed and the
    content decides, so equal documents are in one split and the order of the inputs does not matter.  dedup: drop exact
    duplicates. Empty documents are never written.  text_field: the key of a record's text.  prompt_field,
    completion_field: a record is a prompt and the completion to learn; records with the same prompt are in one split.
    about: further values for the manifest's options.  force: replace an older data folder.

    Raises InputError for bad input, and UsageError for bad arguments or if `out` is not empty.
    """
    shares, fields = _shares(split), Fields(text_field, prompt_field, completion_field)
    sources = find_sources(inputs, format, fields)
    out = Path(out).resolve()
    check_target(out, force, [Path(path).resolve() for path in inputs])
    with staged(out) as temporary:
        manifest = _write(
            temporary, sources, shares=shares, dedup=dedup, fields=fields, workers=workers, seed=seed,
            shard_bytes=shard_bytes,
        )  # fmt: skip
        manifest["options"] |= about or {}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _write(
    folder: Path,
    sources: list[Source],
    *,
    shares: tuple[float, ...],
    dedup: bool,
    fields: Fields,
    workers: int,
    seed: int,
    shard_bytes: int,
) -> dict[str, Any]:
    group_ids = {group: index for index, group in enumerate(sorted({source.group for source in sources}))}
    writers = {name: _SplitWriter(folder, name, shard_bytes, fields.prompt is not None) for name in SPLITS}
    # With dedup, a document of several splits stays in the held-out one: its text is the scarcest, so it is read first.
    order = sorted(sources, key=lambda source: source.split in (None, "train")) if dedup else sources
    is_new = _duplicate_filter(dedup)
    duplicates = 0
    for source, document in read_all(order, fields, workers):
        if not is_new(document):
            duplicates += 1
            continue
        name = source.split or _choose_split(document, shares, seed)
        writers[name].add(document, source.group, group_ids[source.group])
    for writer in writers.values():
        writer.close()
    splits = {name: writer.summary() for name, writer in writers.items()}
    if not splits["train"]["documents"]:
        raise InputError("no document for the train split: the inputs are empty, or --split leaves it nothing")
    return {
        "format": FORMAT,
        "version": VERSION,
        "groups": list(group_ids),
        "splits": splits,
        "duplicates_dropped": duplicates,
        "options": {"split": list(shares), "dedup": dedup, "seed": seed},
    }


def _shares(split: Sequence[float]) -> tuple[float, ...]:
    if len(split) != len(SPLITS) or not all(0 <= share < math.inf for share in split) or not split[0] > 0:
        raise UsageError("split must be three shares for train, valid and test, like 98/1/1, with train above 0")
    return tuple(float(share) for share in split)


def _choose_split(document: Document, shares: tuple[float, ...], seed: int) -> str:
    content = document.content[: document.prompt] or document.content
    digest = hashlib.sha256(seed.to_bytes(8, "little", signed=True) + content).digest()
    point = int.from_bytes(digest[:8], "little") / 2**64 * sum(shares)
    return SPLITS[0] if point < shares[0] else SPLITS[1] if point < shares[0] + shares[1] else SPLITS[2]


def _duplicate_filter(dedup: bool) -> Callable[[Document], bool]:
    seen: set[bytes] = set()

    def is_new(document: Document) -> bool:
        if not dedup:
            return True
        prompt = document.prompt.to_bytes(8, "little") if document.prompt else b""
        key = hashlib.sha256(prompt + document.content).digest()[:16]
        return key not in seen and not seen.add(key)  # type: ignore[func-returns-value]

    return is_new


def check_target(out: Path, force: bool, inputs: Sequence[Path]) -> None:
    """Raises UsageError if a data folder made of these inputs cannot be written to `out` (an absolute path)."""
    if Path.cwd().is_relative_to(out):
        raise UsageError(f"{out} is the current folder or contains it; choose a new folder")
    for path in inputs:
        if out.is_relative_to(path) or path.is_relative_to(out):
            raise UsageError(f"one of the input {path} and the output {out} contains the other; choose another folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; choose another output folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not force:
        raise UsageError(f"{out} is not empty; choose another folder, or --force to replace a data folder")
    if not is_data_folder(out):
        raise UsageError(f"{out} is not a data folder, so --force does not replace it; choose another folder")
