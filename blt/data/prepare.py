"""`prepare`: inputs of many kinds to one data folder, written under a hidden name and renamed when complete.

A data folder has one manifest.json, and for each split shards of raw bytes (`.bin`, documents without separators) with
the document ends (`.offsets.npy`, int64 [documents + 1]) and the documents' groups (`.groups.npy`, int32). Text made of
prompts and completions also has the prompts' lengths in bytes (`.prompts.npy`, int64 [documents]).
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np

from blt.data.compressed import MAX_MEMORY
from blt.data.dataset import FORMAT, MANIFEST, VERSION, is_data_folder
from blt.data.inputs import Source, find_sources
from blt.data.integrity import sha256_of
from blt.data.readers import read_all
from blt.data.records import WHAT_IS_DONE, Document, Fields, Notes, Reading
from blt.data.shares import assign, place
from blt.data.splits import SPLITS, check_shares, split_by_name
from blt.files import staged
from blt_runtime.errors import InputError, UsageError

SHARD_BYTES = 256 << 20
SHARD_DOCUMENTS = 1 << 22
log = logging.getLogger("blt.data")


class _SplitWriter:
    """Appends documents to the shards of one split and counts them. `prompts`: also writes the prompts' lengths."""

    def __init__(self, folder: Path, split: str, shard_bytes: int, prompts: bool = False):
        self.folder, self.split, self.shard_bytes, self.prompts = folder, split, shard_bytes, prompts
        self.shards: list[dict[str, Any]] = []
        self.groups: dict[str, dict[str, int]] = {}
        self._file: BinaryIO | None = None
        self._start_arrays()

    def _start_arrays(self) -> None:
        self._ends, self._ids, self._prompts = array("q", [0]), array("i"), array("q")

    def add(self, document: Document, group: str, group_id: int) -> None:
        if self._file is None:
            self._file = (self.folder / f"{self._stem()}.bin").open("wb")
            self._sha = hashlib.sha256()
        for chunk in document.chunks():
            self._file.write(chunk)
            self._sha.update(chunk)
        self._ends.append(self._ends[-1] + document.size)
        self._ids.append(group_id)
        self._prompts.append(document.prompt)
        count = self.groups.setdefault(group, {"bytes": 0, "documents": 0})
        count["bytes"] += document.size
        count["documents"] += 1
        if self._ends[-1] >= self.shard_bytes or len(self._ids) >= SHARD_DOCUMENTS:
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
        self._start_arrays()

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
    split: Sequence[float] | None = None,
    ignore_names: bool = False,
    group_by: str = "auto",
    dedup: bool = False,
    text_field: str = "text",
    prompt_field: str | None = None,
    completion_field: str | None = None,
    strict: bool = False,
    max_memory: int = MAX_MEMORY,
    workers: int = 1,
    seed: int = 0,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the data folder `out` and returns its manifest.

    split: shares of train, valid and test (default 98/1/1), for documents without a split in the names of their file
    and its folders. A hash of the seed and the content decides, so equal documents are in one split and the order of
    the inputs does not matter. If given, it also splits files named train, but never those named valid or test.
    ignore_names: names select no split.  group_by: see `find_sources`.  dedup: drop exact duplicates. Empty documents
    are never written.  text_field: the key of a record's text, or a path of keys (`meta.text`).  prompt_field,
    completion_field: a record is a prompt and the completion to learn; records with the same prompt are in one split.
    strict: a null text, invalid UTF-8 in parquet, and entries of folders that cannot be read are errors instead of
    being counted.  max_memory: bytes that the window of a compressed file or a row of parquet may need.  about: further
    values for the manifest's options.  force: replace an older data folder.

    Raises InputError for bad input, and UsageError for bad arguments or if `out` is not empty.
    """
    fields = Fields(text_field, prompt_field, completion_field)
    check_shares(split or (1, 1, 1))
    sources = find_sources(
        inputs, format, fields, group_by=group_by, ignore_names=ignore_names, strict=strict, max_memory=max_memory
    )
    _say_if_named(sources, ignore_names)
    sources, shares = assign(sources, split, ignore_names)
    out = Path(out).resolve()
    check_target(out, force, [Path(path).resolve() for path in inputs])
    with staged(out) as temporary:
        reading = Reading(fields, strict, max_memory, spill=temporary)
        manifest = _write(
            temporary, sources, reading, shares=shares, dedup=dedup, workers=workers, seed=seed, shard_bytes=shard_bytes
        )
        manifest["options"] |= about or {}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    _say_what_was_skipped(reading.notes)
    _say_without_validation(manifest, sources, no_share=split is not None and not split[1])
    return manifest


def _write(
    folder: Path,
    sources: list[Source],
    reading: Reading,
    *,
    shares: tuple[float, ...],
    dedup: bool,
    workers: int,
    seed: int,
    shard_bytes: int,
) -> dict[str, Any]:
    group_ids = {group: index for index, group in enumerate(sorted({source.group for source in sources}))}
    writers = {
        name: _SplitWriter(folder, name, shard_bytes=shard_bytes, prompts=reading.fields.prompt is not None)
        for name in SPLITS
    }
    # With dedup, a document of several splits stays in the held-out one: its text is the scarcest, so it is read first.
    order = sorted(sources, key=lambda source: source.split in (None, "train")) if dedup else sources
    is_new = _duplicate_filter(dedup)
    duplicates = 0

    def unique() -> Iterator[tuple[Source, Document]]:
        nonlocal duplicates
        for source, document in read_all(order, reading, workers):
            if is_new(document):
                yield source, document
            else:
                duplicates += 1

    for name, source, document in place(unique(), shares, seed):
        writers[name].add(document, source.group, group_ids[source.group])
    for writer in writers.values():
        writer.close()
    splits = {name: writer.summary() for name, writer in writers.items()}
    if not splits["train"]["documents"]:
        raise InputError("no document for the train split: the inputs are empty")
    return {
        "format": FORMAT,
        "version": VERSION,
        "groups": list(group_ids),
        "splits": splits,
        "duplicates_dropped": duplicates,
        "options": {"split": list(shares), "dedup": dedup, "seed": seed},
    }


def _say_if_named(sources: list[Source], ignore_names: bool) -> None:
    """A single file is an input on purpose: its name decides nothing."""
    if len(sources) == 1 and sources[0].split is None and not ignore_names:
        name = split_by_name(PurePath(sources[0].path.name))
        if name not in (None, "train"):
            log.info("%s is the only input, so its name selects no split (%s)", sources[0].path, name)


def _say_what_was_skipped(notes: Notes) -> None:
    for what, number in notes.counts.items():
        done, unit = WHAT_IS_DONE[what], "record" if number == 1 else "records"
        log.warning(
            "%s %s of %s: %s (first: %s); --strict refuses them", f"{number:,}", unit, what, done, notes.first[what]
        )


def _say_without_validation(manifest: Mapping[str, Any], sources: Sequence[Source], no_share: bool) -> None:
    if manifest["splits"]["valid"]["documents"]:
        return
    if no_share:
        log.info("no validation text: its share is 0 (--split)")
    elif any(source.split is None for source in sources):
        log.warning("no validation text: there is too little text; training measures no validation loss")
    else:
        log.warning(
            "no validation text: no input is named valid; training measures no validation loss; --split 98/2/0 cuts "
            "some off"
        )


def _duplicate_filter(dedup: bool) -> Callable[[Document], bool]:
    seen: set[bytes] = set()

    def is_new(document: Document) -> bool:
        if not dedup:
            return True
        digest = hashlib.sha256(document.prompt.to_bytes(8, "little") if document.prompt else b"")
        for chunk in document.chunks():
            digest.update(chunk)
        key = digest.digest()[:16]
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
