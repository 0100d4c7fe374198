"""Tensors on disk: read without executing anything in a file, and with at most one block of them in memory.

A released checkpoint is 9 GB, most of it hash tables. `StoredTensor` is a tensor that stays in its memory-mapped file;
it is read in blocks of rows, and the pages of a block are released after it. Both writers stream such tensors, so a
conversion holds one block at a time. Only this module opens pickled files.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from blt.checkpoint import claims
from blt.checkpoint.names import listed, without_wrappers
from blt.files import atomic_file
from blt.model.pages import drop_pages
from blt_runtime import reading
from blt_runtime.errors import CheckpointError, MissingExtra, shown

BLOCK = 64 << 20
"""Most bytes of one block of rows (at least one row)."""
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
"""The dtypes of stored weights, with their names in safetensors."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor [R, ...] in a file or in memory: `pieces`, concatenated along the first axis.

    names: the file's name of each piece.  mapped: the pieces are clean pages of a memory-mapped file, which may be
    dropped.
    """

    names: tuple[str, ...]
    pieces: tuple[Tensor, ...]
    mapped: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.pieces[0]
        return tuple(first.shape) if first.ndim == 0 else (sum(len(p) for p in self.pieces), *first.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.pieces[0].dtype

    def blocks(self) -> Iterator[Tensor]:
        """Blocks of consecutive rows, contiguous, in the stored dtype; pages of the file are released after each."""
        for piece in self.pieces:
            yield from self._blocks_of(piece)

    def _blocks_of(self, piece: Tensor) -> Iterator[Tensor]:
        rows = piece if piece.ndim else piece[None]
        size = max(1, BLOCK // max(1, rows[:1].nbytes))
        for block in rows.split(size):
            yield block.detach().contiguous()
            if self.mapped:
                drop_pages(block)

    def copy_to(self, out: Tensor) -> None:
        """Copies into a tensor of the same shape and any floating dtype."""
        for block, target in self.blocks_with(out):
            target.copy_(block)

    def blocks_with(self, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each block with its rows of `out`, a tensor of the same shape."""
        start, rows = 0, out if out.ndim else out[None]
        for block in self.blocks():
            yield block, rows[start : start + len(block)]
            start += len(block)

    def rows(self, first: int, stop: int) -> StoredTensor:
        """The rows [first, stop), still in the file."""
        names, pieces, begin = [], [], 0
        for name, piece in zip(self.names, self.pieces, strict=True):
            part = piece[max(0, first - begin) : max(0, stop - begin)]
            if len(part):
                names.append(name)
                pieces.append(part)
            begin += len(piece)
        return StoredTensor(tuple(names), tuple(pieces), self.mapped)

    def not_finite(self) -> list[str]:
        """Names of the pieces that hold a NaN or an infinity."""
        pieces = zip(self.names, self.pieces, strict=True)
        return [name for name, piece in pieces if not all(_finite(block) for block in self._blocks_of(piece))]


def _finite(block: Tensor) -> bool:
    """The sum runs at the speed of memory and is not finite if an element is not; `isfinite` decides if it is not."""
    return bool(block.sum(dtype=torch.float32).isfinite()) or bool(block.isfinite().all())


SHARDING = "DCP_SHARDING_INFO"
"""The metadata of a safetensors file in which DCP stores where its parts of tensors begin."""
UNREADABLE = (
    RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError, OSError,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""What torch and safetensors raise for a damaged file."""


# --- reading -------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Any]:
    """Unpickles tensors and plain containers only; tensors stay in the file. Raises CheckpointError."""
    _check_readable(path)
    try:
        mapped = claims.check_pickled(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} contains Python objects other than tensors and is refused; save its state dict alone"
            ) from None
        raise CheckpointError(f"{path} is not a PyTorch checkpoint, or it is damaged") from None
    except UNREADABLE:
        raise CheckpointError(f"{path} is not a PyTorch checkpoint, or it is truncated; copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def inside(folder: Path, name: str) -> Path:
    """The file `name` of a checkpoint folder. Raises CheckpointError for a link that leaves the folder."""
    try:
        return reading.in_folder(folder, name)
    except OSError as error:
        raise CheckpointError(f"cannot read {folder / name}: {error.strerror}") from None


def _check_readable(path: Path) -> None:
    """Raises CheckpointError: the libraries report a file without read permission as damaged."""
    try:
        reading.check_plain(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def stored_tensors(tensors: Mapping[str, Any], path: Path) -> dict[str, StoredTensor]:
    """The tensors of an unpickled mapping, without the prefixes of wrappers; `path` is their file.

    Raises CheckpointError if a tensor claims more than the file holds, or if two have one name.
    """
    found = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    claims.check_tensors(found, path)
    mapped = zipfile.is_zipfile(path) and _has_native_byte_order(path)
    return without_wrappers({name: StoredTensor((name,), (t,), mapped) for name, t in found.items()}, path)


def _has_native_byte_order(path: Path) -> bool:
    """False if torch had to swap the bytes: then the tensors are in memory and not in the file."""
    with zipfile.ZipFile(path) as file:
        orders = [file.open(entry).read(16) for entry in file.infolist() if entry.filename.endswith("/byteorder")]
    return all(order == sys.byteorder.encode() for order in orders)


def read_safetensors(*paths: Path) -> dict[str, StoredTensor]:
    """All tensors of these files, still in the files, without the prefixes of wrappers.

    Raises CheckpointError for a damaged file or a repeated name.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MissingExtra("safetensors, which this checkpoint needs,", "hub") from None
    found: dict[str, StoredTensor] = {}
    for path in paths:
        _check_readable(inside(path.parent, path.name))
        try:
            claims.check_safetensors(path)
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, *UNREADABLE) as error:
            raise CheckpointError(
                f"{path} is damaged or not a safetensors file ({shown(str(error), 200)}); copy it again"
            ) from None
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise CheckpointError(f"{path}: {listed(twice)} are in another file of this checkpoint, too")
        found |= {name: StoredTensor((name,), (t,), mapped=True) for name, t in tensors.items()}
    return without_wrappers(found, paths[0].parent if paths else Path())


def read_shards(paths: Sequence[Path]) -> dict[str, StoredTensor]:
    """The whole tensors of a distributed checkpoint (torch's DCP in safetensors), still in the files.

    Each file holds consecutive rows of a tensor, or all. Raises CheckpointError for damaged files and missing rows.
    """
    parts: dict[str, list[tuple[int, StoredTensor]]] = {}
    for path in paths:
        tensors = read_safetensors(path)
        for name, first in _first_rows(path, tensors).items():
            parts.setdefault(name, []).append((first, tensors[name]))
    return {name: _joined(name, sorted(found, key=lambda part: part[0]), paths[0]) for name, found in parts.items()}


def _first_rows(path: Path, names: Iterable[str]) -> dict[str, int]:
    """The number of the first row of each tensor, 0 if the file holds whole ones."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(SHARDING)
    if text is None:
        return dict.fromkeys(names, 0)
    try:
        offsets = {name: reading.parse_json(text)[name]["saved_offsets"] for name in names}
        if any(any(rest) for _, *rest in (offset or [0] for offset in offsets.values())):
            raise ValueError("columns are split")
        return {name: int(offset[0]) if offset else 0 for name, offset in offsets.items()}
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{path}: its {SHARDING} is damaged ({shown(str(error))}); copy it again") from None


def _joined(name: str, parts: Sequence[tuple[int, StoredTensor]], path: Path) -> StoredTensor:
    if len(parts) == 1 and parts[0][0] == 0:
        return parts[0][1]
    begin = 0
    for first, tensor in parts:
        if first != begin:
            raise CheckpointError(f"{path.parent}: rows {begin} to {first} of {name} are missing; copy it again")
        begin += tensor.shape[0]
    names, pieces = ([x for _, tensor in parts for x in getattr(tensor, key)] for key in ("names", "pieces"))
    return StoredTensor(tuple(names), tuple(pieces), mapped=True)


# --- writing -------------------------------------------------------------------------------------------------


def write_pickled(
    path: Path,
    content: dict[str, Any],
    models: Mapping[str, Mapping[str, StoredTensor]],
    dtype: torch.dtype | None = None,
) -> None:
    """`torch.save` of `content` with a state dict for each key of `models`, streamed and atomic.

    dtype: of the file's weights (default: as stored).  The file is written with empty space for the tensors, which is
    then filled through a shared mapping, so that no whole tensor is ever in memory. Equal content gives equal bytes.
    """
    empty = {
        key: {name: torch.empty(t.shape, dtype=dtype or t.dtype) for name, t in weights.items()}
        for key, weights in models.items()
    }

    with atomic_file(path) as file:
        try:
            with torch.serialization.skip_data():
                torch.save(_interned({**content, **empty}), file)
        except RuntimeError as error:  # torch ends its archive after a failed write, which fails too
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        file.flush()
        if any(models.values()):
            _fill(file, models)


def _fill(file: BinaryIO, models: Mapping[str, Mapping[str, StoredTensor]]) -> None:
    """Writes tensors into the empty space for them, through a shared mapping of the file."""
    # A full disk raises OSError here; without this it would kill the process at a write to the mapping.
    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        space = torch.load(file.name, map_location="cpu", weights_only=True, mmap=True)
    checksums = []
    for key, weights in models.items():
        for name, tensor in weights.items():
            checksum = 0
            for block, target in tensor.blocks_with(space[key][name]):
                target.copy_(cast(block, target.dtype, tensor.names[0]))
                checksum = zlib.crc32(raw_bytes(target), checksum)
                drop_pages(target)  # the content is in the file, which the kernel flushes
            checksums.append(checksum)
    _write_checksums(file, checksums)


def _write_checksums(file: BinaryIO, checksums: list[int]) -> None:
    """Replaces the checksums of the empty space by those of the tensors: entry `data/N` holds the N-th one."""
    with zipfile.ZipFile(file.name) as archive:
        entries, at = archive.infolist(), archive.start_dir
    for entry in entries:
        begin = at
        file.seek(begin)
        at += 46 + sum(struct.unpack("<3H", file.read(46)[28:34]))  # name, extra field, comment
        folder, _, number = entry.filename.rpartition("/")
        if not folder.endswith("data") or not number.isdigit() or not entry.file_size:
            continue
        checksum = struct.pack("<I", checksums[int(number)])
        file.seek(begin + 16)
        file.write(checksum)
        file.seek(entry.header_offset)
        header = file.read(30)
        file.seek(entry.header_offset + 30 + sum(struct.unpack("<2H", header[26:30])) + entry.file_size)
        if file.read(4) == b"PK\x07\x08":  # the checksum after the data, which unzip compares
            file.seek(0, os.SEEK_CUR)
            file.write(checksum)


def _interned(value: Any) -> Any:
    """A copy in which equal strings are one object, because a pickle depends on object identity."""
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, dict):
        return {_interned(key): _interned(item) for key, item in value.items()}
    return [_interned(item) for item in value] if isinstance(value, list) else value


def write_safetensors(path: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None = None) -> None:
    """Writes a safetensors file, streamed and atomic; the package's writer needs all bytes in memory.

    dtype: of the file's weights (default: as stored).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        kind = dtype or tensor.dtype
        begin, end = end, end + kind.itemsize * math.prod(tensor.shape)
        header[name] = {"dtype": DTYPES[kind], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned

    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for block in tensor.blocks():
                file.write(raw_bytes(cast(block, dtype or block.dtype, tensor.names[0])))


def cast(block: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Casts to `dtype`. Raises CheckpointError that names the tensor if a number is too large for it."""
    narrow = block.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(block.dtype).max and not _finite(narrow):
        raise CheckpointError(
            f"{name} has numbers beyond {torch.finfo(dtype).max:.3g}, the largest "
            f"{str(dtype).removeprefix('torch.')}; choose a wider dtype"
        )
    return narrow


def raw_bytes(block: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    data: memoryview = block.reshape(-1).view(torch.uint8).numpy().data
    return data
