"""Stored patch boundaries: one bit a token, a file for each shard, and a plan that says what they are.

A folder of boundaries holds `boundaries.json`, the plan: the entropy model (a hash of its weights), the arithmetic, the
patch rule with its threshold, and the shards with hashes of their text. Each shard has `SHARD.bits.npy`, uint8
[ceil(tokens / 8)], and `SHARD.json` with its tokens, patches and the sha256 of its bits. Token t of a shard (BOS,
bytes, EOS of its documents one after another) begins a patch if bit t % 8 of byte t // 8 is 1.

The plan is written first. The record of a shard is written last: a shard without one is not computed. No torch here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from blt import files
from blt.data.batches import Int, never
from blt.data.cache_files import create_file, writable_folder
from blt.data.dataset import Dataset, Documents
from blt.data.starts import chunks
from blt_runtime import reading
from blt_runtime.errors import InputError, RuleError
from blt_runtime.patching import PatchRule
from blt_runtime.records import from_dict, to_dict

FORMAT, VERSION, PLAN = "blt-boundaries", 1, "boundaries.json"
FOLDER = "boundaries"
"""In a data folder: where `blt train blt` looks for boundaries."""
Dtype = Literal["float32", "bfloat16"]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class ShardText:
    """A shard of text. `text_sha256` covers its bytes and the ends of its documents; `tokens` count BOS and EOS."""

    name: str
    documents: int
    tokens: int
    text_sha256: str


@dataclass(frozen=True)
class Flips:
    """Boundaries of a sample of `tokens` under the plan's arithmetic, compared with those in float32: `lost` are only
    in float32's, `new` only in the plan's. `boundaries` are those of float32."""

    tokens: int
    boundaries: int
    lost: int
    new: int


@dataclass(frozen=True)
class Plan:
    """What the boundaries of a folder are.

    entropy: hash of the entropy model's weights, configuration and newlines.  dtype: arithmetic of its matrix products.
    target_patch_size: if the threshold was chosen for it, on a sample of the training documents of `groups` (None: of
    all); None if it was given.  shards: of each split, in order.  flips: None in float32.
    """

    entropy: str
    dtype: Dtype
    rule: PatchRule
    target_patch_size: float | None
    groups: tuple[str, ...] | None
    shards: dict[str, tuple[ShardText, ...]]
    flips: Flips | None = None
    format: str = FORMAT
    version: int = VERSION

    @property
    def key(self) -> str:
        """Identifies the entropies that decide: in float32 that of the entropy model."""
        return self.entropy if self.dtype == "float32" else f"{self.entropy}-{self.dtype}"

    def names(self) -> list[tuple[str, ShardText]]:
        """(split, shard) of all shards, in order."""
        return [(split, shard) for split, shards in self.shards.items() for shard in shards]


@dataclass(frozen=True)
class Record:
    """A computed shard: its tokens, the patches that begin in it, and the sha256 of its bits."""

    tokens: int
    patches: int
    sha256: str


def shards_of(documents: Documents) -> tuple[ShardText, ...]:
    """The shards of a split, as a plan describes them."""
    first = documents.shard_offsets
    tokens = np.diff(documents.token_offsets[first])
    return tuple(
        ShardText(name, documents=int(n), tokens=int(t), text_sha256=sha256)
        for name, n, t, sha256 in zip(
            documents.shard_names, np.diff(first), tokens, documents.text_sha256, strict=True
        )
    )  # fmt: skip


# --- the plan ----------------------------------------------------------------------------------------------


def create_plan(folder: Path, make: Callable[[], Plan]) -> None:
    """Writes the plan that `make` makes, unless the folder has one; one process makes it and the others wait.

    Raises InputError if the folder cannot be written, and what `make` raises.
    """

    def write(out: BinaryIO) -> None:
        out.write((json.dumps(to_dict(make()), indent=1) + "\n").encode())

    create_file(folder / PLAN, write)


def read_plan(folder: Path) -> Plan:
    """Raises InputError if the folder holds no plan, or a damaged one."""
    path = folder / PLAN
    try:
        raw = reading.read_json(path)
    except FileNotFoundError:
        raise InputError(f"{folder} holds no boundaries (no {PLAN}); make them with `blt data boundaries`") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({reading.reason(error)}); delete {folder} and make it again") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise InputError(f"{path} is no plan of boundaries; make one with `blt data boundaries`")
    if isinstance(raw.get("version"), int) and raw["version"] > VERSION:
        raise InputError(f"{folder} was made by a newer version (format {raw['version']}); upgrade this package")
    try:
        return from_dict(Plan, raw, str(path), InputError)
    except RuleError as error:
        raise InputError(f"{path} is damaged ({error}); delete {folder} and make it again") from error


def check_text(folder: Path, plan: Plan, dataset: Dataset, splits: Iterable[str]) -> None:
    """Raises InputError unless the plan has these splits, with the shards that the data has now."""
    for split in splits:
        ours = shards_of(dataset.split(split))
        theirs = plan.shards.get(split)
        if theirs is None and ours:
            raise InputError(f"{folder} has no boundaries of the split {split}; make them with `blt data boundaries`")
        if ours != (theirs or ()):
            named = next((a.name for a, b in zip(ours, theirs or (), strict=False) if a != b), "their number")
            raise InputError(
                f"{folder} has boundaries of other text than {dataset.folder} (of {split}: {named} differs); make them "
                "again with `blt data boundaries`"
            )


def difference(stored: Any, wanted: Any) -> str:
    """The first field in which two records of one kind differ, with both values; empty if they are equal."""
    for field in fields(stored):
        old, new = getattr(stored, field.name), getattr(wanted, field.name)
        if old != new:
            return f"{field.name} {old}, not {new}"
    return ""


# --- shards ------------------------------------------------------------------------------------------------


def bits_path(folder: Path, shard: str) -> Path:
    """The bits of a shard."""
    return folder / f"{shard}.bits.npy"


def record_of(folder: Path, shard: ShardText) -> Record | None:
    """The record of a shard; None if it is not computed. Raises InputError for a damaged one."""
    path = folder / f"{shard.name}.json"
    try:
        raw = reading.read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({reading.reason(error)}); delete it and run again") from error
    record = from_dict(Record, raw, str(path), InputError)
    if record.tokens != shard.tokens:
        raise InputError(f"{path} does not fit the plan; delete it and run again")
    return record


def missing(folder: Path, plan: Plan, splits: Sequence[str] | None = None) -> list[tuple[str, ShardText]]:
    """(split, shard) of the shards that are not computed."""
    return [
        (split, shard)
        for split, shard in plan.names()
        if (splits is None or split in splits) and record_of(folder, shard) is None
    ]


def write_shard(folder: Path, shard: ShardText, starts: Iterable[Bools]) -> Record:
    """Writes the bits of a shard, and then its record.

    starts: of its documents in order, bool [length + 2] each. Raises InputError if the folder cannot be written.
    """
    digest, patches, tokens = hashlib.sha256(), 0, 0

    def counted() -> Iterator[Bools]:
        nonlocal patches, tokens
        for part in starts:
            patches, tokens = patches + int(part.sum()), tokens + len(part)
            yield part

    with writable_folder(folder), files.atomic_file(bits_path(folder, shard.name)) as file:
        what = {"descr": "|u1", "fortran_order": False, "shape": (-(-shard.tokens // 8),)}
        np.lib.format.write_array_header_1_0(file, what)
        for part in _packed(counted()):
            file.write(part)
            digest.update(part)
        assert tokens == shard.tokens
    record = Record(tokens, patches, digest.hexdigest())
    with writable_folder(folder):
        files.replace_text(folder / f"{shard.name}.json", json.dumps(to_dict(record)) + "\n")
    return record


def _packed(parts: Iterable[Bools]) -> Iterator[bytes]:
    """The bits of booleans in a row, in whole bytes; the last byte ends with zeros."""
    rest = np.empty(0, np.bool_)
    for part in parts:
        rest = np.concatenate([rest, part])
        whole = len(rest) // 8 * 8
        yield np.packbits(rest[:whole], bitorder="little").tobytes()
        rest = rest[whole:]
    yield np.packbits(rest, bitorder="little").tobytes()


class StoredBoundaries:
    """The patch boundaries of a split, read from a folder (`PatchStarts`).

    A shard's bits are compared with their sha256 when the first of its documents is read.
    """

    def __init__(self, folder: Path, plan: Plan, dataset: Dataset, split: str):
        self.folder, self.plan, self.split = folder, plan, split
        self.documents = dataset.split(split)
        self._shards = plan.shards.get(split, ())
        self._bits: dict[int, NDArray[np.uint8]] = {}

    @property
    def key(self) -> str:
        """Identifies the entropy model and its arithmetic."""
        return self.plan.key

    def compute(self, members: Int, stopped: Callable[[], bool] = never) -> None:
        """All boundaries are stored."""

    def computed(self, members: Int) -> bool:
        """True."""
        return True

    def starts(self, document: int) -> Bools:
        """True where a patch begins, [length + 2] over BOS ... EOS. Raises InputError if the bits are damaged."""
        offsets, shards = self.documents.token_offsets, self.documents.shard_offsets
        shard = int(np.searchsorted(shards, document, side="right")) - 1
        begin, end = (int(at) for at in offsets[document : document + 2] - offsets[shards[shard]])
        bits = np.unpackbits(self._shard(shard)[begin // 8 : -(-end // 8)], bitorder="little")
        return bits[begin % 8 : begin % 8 + end - begin].view(np.bool_)

    def boundaries(self, members: Int) -> Int:
        """Where patches begin in the tokens of these documents, one after another: ascending. Raises InputError."""
        found = [np.empty(0, np.int64)]
        for offset, part in chunks(self.documents.lengths[members] + 2):
            found.append(np.flatnonzero(self._starts(members[part])) + offset)
        return np.concatenate(found)

    def _starts(self, members: Int) -> Bools:
        """True where a patch begins in the tokens of these documents, one after another."""
        offsets, shards = self.documents.token_offsets, self.documents.shard_offsets
        shard = np.searchsorted(shards, members, side="right") - 1
        begin, end = (offsets[at] - offsets[shards[shard]] for at in (members, members + 1))
        first, last = begin // 8, -(-end // 8)
        whole = {number: self._shard(number) for number in np.unique(shard).tolist()}
        parts = zip(shard.tolist(), first.tolist(), last.tolist(), strict=True)
        packed = np.concatenate([whole[number][byte:byte_end] for number, byte, byte_end in parts])
        bits = np.unpackbits(packed, bitorder="little").view(np.bool_)
        at = 8 * (np.cumsum(last - first) - last)  # of bit 0 of a shard in `bits`, before each document
        spans = zip((at + begin).tolist(), (at + end).tolist(), strict=True)
        return np.concatenate([bits[bit:bit_end] for bit, bit_end in spans])

    def _shard(self, number: int) -> NDArray[np.uint8]:
        if number not in self._bits:
            # A plain array over the map: a slice of a memmap takes ten times as long.
            self._bits[number] = np.asarray(_read_bits(self.folder, self._shards[number]))
        return self._bits[number]


def _read_bits(folder: Path, shard: ShardText) -> NDArray[np.uint8]:
    path, record = bits_path(folder, shard.name), record_of(folder, shard)
    if record is None:
        raise InputError(f"{folder} lacks the shard {shard.name}; run `blt data boundaries` again")
    try:
        bits = reading.read_array(path, mapped=True)
    except (OSError, ValueError) as error:
        raise InputError(_damaged(path, shard, reading.reason(error))) from error
    if bits.dtype != np.uint8 or bits.shape != (-(-shard.tokens // 8),):
        raise InputError(_damaged(path, shard, "it does not fit the plan"))
    if hashlib.sha256(bits.data).hexdigest() != record.sha256:
        raise InputError(_damaged(path, shard, "its sha256 is another"))
    return bits


def _damaged(path: Path, shard: ShardText, why: str) -> str:
    return f"{path} is damaged ({why}); delete {shard.name}.json there and run `blt data boundaries` again"
