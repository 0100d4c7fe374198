"""Tensors on disk: read without running what is in a file, and without holding more of it than one block.

A released checkpoint is 9 GB, most of it hash tables. `StoredTensor` is a tensor that stays in its file, memory-mapped;
whoever needs it reads blocks of rows, and the pages go when the block is done. Both writers stream such tensors, so
a conversion holds one block at a time. This is the one place that opens pickled files.
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from blt.model.pages import drop_pages
from blt_runtime.errors import CheckpointError, MissingExtra

BLOCK = 64 << 20
"""Bytes that one block of rows holds at most (one row at least)."""
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
"""What a weight may be stored as, and its name in safetensors."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor [R, ...] in a file or in memory: `pieces` that follow each other along the first axis.

    names: what the file calls each piece.  mapped: the pieces are clean pages of a memory-mapped file, which may be
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
        """Consecutive rows, contiguous, in the stored dtype; what was read of the file leaves memory again."""
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
        """Into a tensor of the same shape and any floating dtype."""
        for block, target in self.beside(out):
            target.copy_(block)

    def beside(self, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each block with the rows of `out`, a tensor of the same shape, that belong to it."""
        start, rows = 0, out if out.ndim else out[None]
        for block in self.blocks():
            yield block, rows[start : start + len(block)]
            start += len(block)

    def not_finite(self) -> list[str]:
        """Names of the pieces that hold a NaN or an infinity."""
        pieces = zip(self.names, self.pieces, strict=True)
        return [name for name, piece in pieces if not all(_finite(block) for block in self._blocks_of(piece))]


def _finite(block: Tensor) -> bool:
    """A sum is not finite if an element is not, and is read at the speed of memory; `isfinite` decides the rest."""
    return bool(block.sum(dtype=torch.float32).isfinite()) or bool(block.isfinite().all())


# --- reading -------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> dict[str, Any]:
    """Unpickle tensors and plain containers, nothing else; tensors stay in the file. Raises CheckpointError."""
    _check_readable(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} contains Python objects other than tensors and is refused; save its state dict alone"
            ) from None
        raise CheckpointError(f"{path} is no PyTorch checkpoint, or a damaged one") from None
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OSError):
        raise CheckpointError(f"{path} is no PyTorch checkpoint, or a truncated one; copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _check_readable(path: Path) -> None:
    """Raises CheckpointError; the libraries call a file damaged that may not be read."""
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def stored_tensors(tensors: Mapping[str, Any], path: Path) -> dict[str, StoredTensor]:
    """Those of an unpickled mapping that are tensors; `path` is the file they lie in."""
    mapped = zipfile.is_zipfile(path) and _is_of_this_machine(path)
    return {name: StoredTensor((name,), (t,), mapped) for name, t in tensors.items() if isinstance(t, Tensor)}


def _is_of_this_machine(path: Path) -> bool:
    """False where torch turned the bytes of a file of the other endianness around: in memory, not in the file."""
    with zipfile.ZipFile(path) as file:
        orders = [file.read(name) for name in file.namelist() if name.endswith("/byteorder")]
    return all(order.decode() == sys.byteorder for order in orders)


def read_safetensors(*paths: Path) -> dict[str, StoredTensor]:
    """All tensors of some files, which stay there. Raises CheckpointError for a damaged file or a name given twice."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MissingExtra("safetensors, which this checkpoint needs,", "hub") from None
    found: dict[str, StoredTensor] = {}
    for path in paths:
        _check_readable(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, KeyError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path} is damaged or no safetensors file ({error}); copy it again") from None
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise CheckpointError(f"{path}: {', '.join(twice)} lie in another file of this checkpoint, too")
        found |= {name: StoredTensor((name,), (t,), mapped=True) for name, t in tensors.items()}
    return found


# --- writing -------------------------------------------------------------------------------------------------


def atomic_write(path: Path, write: Callable[[BinaryIO, Path], None]) -> None:
    """`write(file, its path)` fills a file beside `path`, which is flushed to disk and renamed over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w+b") as file:
            write(file, temporary)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def atomic_save(path: Path, content: Any) -> None:
    """`torch.save`, all or nothing."""
    atomic_write(path, lambda file, _: torch.save(content, file))


def write_pickled(
    path: Path,
    content: dict[str, Any],
    parts: Mapping[str, Mapping[str, StoredTensor]],
    dtype: torch.dtype | None = None,
) -> None:
    """`torch.save` of `content` with a state dict under the key of each part, streamed, all or nothing.

    dtype: of the file's weights (default: as stored).  The file is laid out with room for the tensors and then
    filled through a shared mapping, so that no tensor is ever in memory as a whole. Equal content gives equal bytes.
    """
    empty = {
        key: {name: torch.empty(t.shape, dtype=dtype or t.dtype) for name, t in part.items()}
        for key, part in parts.items()
    }

    def write(file: BinaryIO, temporary: Path) -> None:
        with torch.serialization.skip_data():
            torch.save(_interned({**content, **empty}), file)
        file.flush()
        if not any(parts.values()):
            return
        os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)  # a full disk is an error here, a crash later
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            room = torch.load(temporary, map_location="cpu", weights_only=True, mmap=True)
        for key, part in parts.items():
            for name, tensor in part.items():
                _fill(tensor, room[key][name])

    atomic_write(path, write)


def _interned(value: Any) -> Any:
    """The same with equal strings as one object: a pickle depends on which objects are the same."""
    if isinstance(value, str):
        return sys.intern(value)
    if isinstance(value, dict):
        return {_interned(key): _interned(item) for key, item in value.items()}
    return [_interned(item) for item in value] if isinstance(value, list) else value


def _fill(source: StoredTensor, room: Tensor) -> None:
    for block, target in source.beside(room):
        target.copy_(cast(block, room.dtype, source.names[0]))
        drop_pages(target)  # written through to the file, which the kernel flushes


def write_safetensors(path: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype | None = None) -> None:
    """A safetensors file, streamed, all or nothing; the package's own writer wants all bytes in memory at once.

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

    def write(file: BinaryIO, _: Path) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for block in tensor.blocks():
                file.write(raw_bytes(cast(block, dtype or block.dtype, tensor.names[0])))

    atomic_write(path, write)


def cast(block: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Finite numbers in `dtype`. Raises CheckpointError that names the tensor if one is too large for it."""
    narrow = block.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(block.dtype).max and not _finite(narrow):
        raise CheckpointError(
            f"{name} has numbers beyond {torch.finfo(dtype).max:.3g}, the largest "
            f"{str(dtype).removeprefix('torch.')}: choose a wider type"
        )
    return narrow


def raw_bytes(block: Tensor) -> memoryview:
    """A contiguous tensor's bytes, not copied."""
    data: memoryview = block.reshape(-1).view(torch.uint8).numpy().data
    return data
