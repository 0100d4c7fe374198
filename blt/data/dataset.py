"""Reads a data folder: memory-mapped shards, documents by index, the manifest as a report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blt.data import integrity
from blt_runtime import reading
from blt_runtime.errors import InputError, UsageError
from blt_runtime.ids import BOS, EOS, OFFSET

FORMAT, VERSION, MANIFEST = "blt-data", 1, "manifest.json"
_COUNT = {"bytes": int, "documents": int}
_SHARD = _COUNT | {"name": str, "sha256": str}
_EACH = "*"
_SHAPE = {
    "version": int,
    "groups": [str],
    "splits": {_EACH: _COUNT | {"groups": {_EACH: _COUNT}, "shards": [_SHARD]}},
    "options": dict,
}
"""The required content of a manifest: types, lists of one type, mappings with these keys or (`_EACH`) any keys."""


def is_data_folder(path: Path) -> bool:
    """Whether `path` holds a manifest of this format; its shards are not checked."""
    try:
        return bool(_read(path).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError):
        return False


def _read(folder: Path) -> Any:
    return reading.read_json(reading.in_folder(folder, MANIFEST))


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a data folder, checked. Raises InputError, and UsageError if there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such data folder; make one with `blt data prepare`")
    if not is_data_folder(folder):
        raise InputError(
            f"{folder} is not a data folder (no {MANIFEST} of the right format); make one with `blt data prepare`"
        )
    manifest: dict[str, Any] = _read(folder)
    version = manifest.get("version")
    if isinstance(version, int) and version > VERSION:
        raise InputError(f"{folder} was made by a newer version (format {version}); upgrade this package")
    shards = [s for split in manifest["splits"].values() for s in split["shards"]] if _fits(manifest, _SHAPE) else None
    if shards is None or any(Path(s["name"]).name != s["name"] or not _fits(s.get("arrays", {}), dict) for s in shards):
        raise InputError(f"{folder / MANIFEST} is damaged; run `blt data prepare` again")
    return manifest


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, type):
        return isinstance(value, shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(item, shape[0]) for item in value)
    if not isinstance(value, dict):
        return False
    if _EACH in shape:
        return all(_fits(item, shape[_EACH]) for item in value.values())
    return all(key in value and _fits(value[key], inner) for key, inner in shape.items())


def info(folder: str | Path, verify: bool = False) -> dict[str, Any]:
    """The contents of a data folder as plain values for JSON. Checks every shard's size, and with `verify` its content.

    Raises InputError.
    """
    dataset = Dataset(folder)
    if verify:
        dataset.verify()
    splits = {
        name: {key: value for key, value in split.items() if key != "shards"} | {"shards": len(split["shards"])}
        for name, split in dataset.manifest["splits"].items()
    }
    return {"path": str(folder), "splits": splits, "options": dataset.manifest["options"]}


def _integers(path: Path, length: int) -> NDArray[np.int64]:
    """Integers [length] from a .npy file. Raises InputError."""
    try:
        array = reading.read_array(path)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is damaged ({reading.reason(error)}); run `blt data prepare` again") from error
    if array.dtype.kind != "i" or array.shape != (length,):
        raise InputError(f"{path} does not fit the manifest; run `blt data prepare` again")
    return array


def _offsets(path: Path, shard: dict[str, Any]) -> NDArray[np.int64]:
    """The offsets of a shard's documents, [documents + 1]. Raises InputError."""
    offsets = _integers(path, shard["documents"] + 1)
    if offsets[0] != 0 or offsets[-1] != shard["bytes"] or (np.diff(offsets) < 0).any():
        raise InputError(f"{path} does not fit its shard; run `blt data prepare` again")
    return offsets


def _prompts(path: Path, shard: dict[str, Any], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of each document's prompt, [documents]; zeros in a shard without prompts. Raises InputError."""
    if "prompt_bytes" not in shard:
        return np.zeros(shard["documents"], np.int64)
    lengths = _integers(path, shard["documents"])
    if (lengths < 0).any() or (lengths > np.diff(offsets)).any() or lengths.sum() != shard["prompt_bytes"]:
        raise InputError(f"{path} does not fit its shard; run `blt data prepare` again")
    return lengths


def _digest(text: str, *arrays: NDArray[np.int64]) -> str:
    """sha256 over a shard: the sha256 of its bytes, and arrays about its documents."""
    digest = hashlib.sha256(text.encode())
    for array in arrays:
        digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()


class Documents:
    """The documents of one split, in shard order.

    `sha256` identifies the content of every shard: bytes, ends, groups and prompts of its documents. `text_sha256`
    covers only bytes and ends. `shard_offsets` [shards + 1] are the first documents of the shards `shard_names`.
    """

    def __init__(self, folder: Path, shards: list[dict[str, Any]], group_names: list[str]):
        self.names = group_names
        stems = [folder / shard["name"] for shard in shards]
        # Plain arrays over the maps: a slice of a memmap takes ten times as long as that of an array.
        self._data = [np.asarray(np.memmap(f"{stem}.bin", np.uint8, mode="r")) for stem in stems]
        offsets = [_offsets(Path(f"{stem}.offsets.npy"), shard) for stem, shard in zip(stems, shards, strict=True)]
        ids = [_integers(Path(f"{stem}.groups.npy"), s["documents"]) for stem, s in zip(stems, shards, strict=True)]
        if any(part.size and not 0 <= part.min() <= part.max() < len(group_names) for part in ids):
            raise InputError(f"{folder}: groups that the manifest does not name; run `blt data prepare` again")
        self._prompts = [
            _prompts(Path(f"{stem}.prompts.npy"), s, o) for stem, s, o in zip(stems, shards, offsets, strict=True)
        ]
        empty = np.empty(0, np.int64)
        self.shard_names = [str(shard["name"]) for shard in shards]
        self.shard_offsets = np.cumsum([0, *(len(group) for group in ids)]).astype(np.int64)
        self._shard = np.repeat(np.arange(len(stems)), np.diff(self.shard_offsets))
        self._start = np.concatenate([empty, *(offset[:-1] for offset in offsets)])
        self.lengths = np.concatenate([empty, *(np.diff(offset) for offset in offsets)])
        self.group_ids = np.concatenate([empty, *ids]).astype(np.int64)
        texts = [str(shard["sha256"]) for shard in shards]
        self.text_sha256 = [_digest(*shard) for shard in zip(texts, offsets, strict=True)]
        self.sha256 = [_digest(*shard) for shard in zip(texts, offsets, ids, self._prompts, strict=True)]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def n_bytes(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def token_offsets(self) -> NDArray[np.int64]:
        """The offsets of each document's tokens (BOS, bytes, EOS) in the whole split, [documents + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths + 2)]).astype(np.int64)

    token_bytes: None = None
    """Ids from 4 on are one byte each."""

    @cached_property
    def prompt_lengths(self) -> NDArray[np.int64]:
        """Leading bytes of each document that carry no loss, [documents]; zeros without prompts."""
        return np.concatenate([np.empty(0, np.int64), *self._prompts])

    def group(self, index: int) -> str:
        """The name of a document's group."""
        return self.names[int(self.group_ids[index])]

    def of_groups(self, groups: Iterable[str]) -> NDArray[np.int64]:
        """Indices of the documents of these groups. Raises InputError for a group that is not in the data."""
        wanted = list(groups)
        unknown = [group for group in wanted if group not in self.names]
        if unknown:
            raise InputError(f"no group {unknown[0]!r} in the data; it has {', '.join(self.names)}")
        return np.flatnonzero(np.isin(self.group_ids, [self.names.index(group) for group in wanted]))

    def bytes(self, index: int) -> bytes:
        """The bytes of a document."""
        return self._bytes(index).tobytes()

    def ids(self, index: int) -> NDArray[np.int16]:
        """BOS, the document's bytes, EOS as ids, int16 [length + 2]."""
        return self._ids(index, 0, int(self.lengths[index]) + 2)

    def read(self, documents: NDArray[np.int64], begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int16]:
        """`ids(document)[begin:end]` of each of these documents, one after another."""
        stop, n_tokens = np.cumsum(end - begin), self.lengths[documents] + 2
        start = stop - (end - begin)
        text = np.empty(int(stop[-1]) if len(stop) else 0, np.uint8)
        first = np.maximum(begin, 1)
        self._copy(
            documents, first=first - 1, last=np.minimum(end, n_tokens - 1) - 1, out=text, at=start + first - begin
        )
        ids = text.astype(np.int16)
        ids += OFFSET
        ids[start[(begin == 0) & (end > 0)]] = BOS
        ids[stop[(end == n_tokens) & (begin < end)] - 1] = EOS
        return ids

    def texts(self, documents: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The bytes of these documents, one after another, each between two NUL bytes in the places of BOS and EOS."""
        lengths = self.lengths[documents]
        offsets = np.cumsum(lengths + 2) - lengths - 2
        text = np.zeros(int((lengths + 2).sum()), np.uint8)
        self._copy(documents, first=np.zeros_like(lengths), last=lengths, out=text, at=offsets + 1)
        return text

    def _copy(
        self,
        documents: NDArray[np.int64],
        *,
        first: NDArray[np.int64],
        last: NDArray[np.int64],
        out: NDArray[np.uint8],
        at: NDArray[np.int64],
    ) -> None:
        """Copies the bytes [first, last) of each of these documents to the places of `out` that begin at `at`."""
        begin, size = self._start[documents] + first, last - first
        pieces = (self._shard[documents], begin, begin + size, at, at + size)
        for shard, source, source_end, place, place_end in zip(*(array.tolist() for array in pieces), strict=True):
            out[place:place_end] = self._data[shard][source:source_end]

    @property
    def tokens(self) -> TokenStream:
        """The tokens of all documents, one after another; a slice reads only what it covers."""
        return TokenStream(self)

    def _ids(self, index: int, begin: int, end: int) -> NDArray[np.int16]:
        """Tokens [begin, end) of a document; token 0 is BOS, the last one EOS."""
        length = int(self.lengths[index])
        ids = np.empty(end - begin, np.int16)
        first, stop = max(begin, 1), min(end, length + 1)
        np.add(self._bytes(index)[first - 1 : stop - 1], OFFSET, out=ids[first - begin : stop - begin], dtype=np.int16)
        if begin == 0:
            ids[0] = BOS
        if end == length + 2:
            ids[-1] = EOS
        return ids

    def _bytes(self, index: int) -> NDArray[np.uint8]:
        start = int(self._start[index])
        return self._data[int(self._shard[index])][start : start + int(self.lengths[index])]


class TokenStream:
    """All tokens of a split in order, read in slices that cross documents, int16."""

    def __init__(self, documents: Documents):
        self._documents = documents

    def __len__(self) -> int:
        return int(self._documents.token_offsets[-1])

    def __getitem__(self, part: slice) -> NDArray[np.int16]:
        begin, end, _ = part.indices(len(self))
        offsets = self._documents.token_offsets
        found = [np.empty(0, np.int16)]
        index = int(np.searchsorted(offsets, begin, side="right")) - 1
        while begin < end:
            start = int(offsets[index])
            stop = min(end, int(offsets[index + 1]))
            found.append(self._documents._ids(index, begin - start, stop - start))
            begin, index = stop, index + 1
        return np.concatenate(found)


class Dataset:
    """A data folder opened for reading. Opening checks manifest and sizes; `check` and `verify` check contents."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._opened: dict[str, Documents] = {}
        for name in self.manifest["splits"]:
            for shard in self._shards(name):
                self._check_size(shard)

    def _shards(self, split: str) -> list[dict[str, Any]]:
        shards: list[dict[str, Any]] = self.manifest["splits"][split]["shards"]
        return shards

    def _check_size(self, shard: dict[str, Any]) -> None:
        path = self.folder / f"{shard['name']}.bin"
        arrays = ("offsets", "groups", *(["prompts"] if "prompt_bytes" in shard else []))
        for file in (path, *(self.folder / f"{shard['name']}.{array}.npy" for array in arrays)):
            if not file.is_file():
                raise InputError(f"{file}: missing; run `blt data prepare` again")
        if path.stat().st_size != shard["bytes"]:
            size = path.stat().st_size
            raise InputError(f"{path}: {size} bytes, the manifest says {shard['bytes']}; run `blt data prepare` again")

    def split(self, name: str) -> Documents:
        """The documents of `train`, `valid` or `test`, possibly none. Raises InputError for another name."""
        if name not in self.manifest["splits"]:
            raise InputError(f"no split {name!r} in {self.folder}; it has {', '.join(self.manifest['splits'])}")
        if name not in self._opened:
            self._opened[name] = Documents(self.folder, self._shards(name), self.manifest["groups"])
        return self._opened[name]

    def check(self, *splits: str) -> None:
        """Checks that the shards of these splits are unchanged since they were prepared. Raises InputError.

        A file is read once; its size and modification time are recorded, so that the next start reads nothing.
        """
        for name in splits:
            integrity.check(self.folder, self._shards(name), trust_stamps=True)

    def verify(self) -> None:
        """Reads every shard and compares its sha256 with the manifest's. Raises InputError."""
        shards = [shard for name in self.manifest["splits"] for shard in self._shards(name)]
        integrity.check(self.folder, shards, trust_stamps=False)
