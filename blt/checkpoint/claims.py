"""What a checkpoint file claims, compared with its size before a library believes it and allocates memory.

A zip archive may expand, a pickle of 20 bytes may make gigabytes, strides of 0 make a tensor of any size out of four
bytes, and a header may name more than the file holds. Nothing of it is needed to store weights, so it is refused. The
functions raise CheckpointError.
"""

from __future__ import annotations

import os
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn, cast

import torch
from torch import Tensor

from blt_runtime import reading
from blt_runtime.errors import CheckpointError, shown

LARGEST_DIRECTORY = 4 << 20
"""Most bytes of a zip archive's directory: about 60,000 entries."""
LARGEST_PICKLE = 16 << 20
"""Most bytes of a pickle without its tensors; the text of a tokenizer is the largest part of it."""
MOST_STEPS = 1 << 20
"""Most instructions of a pickle. A tensor has 30."""
MOST_TENSORS = 20_000
SHARED = 2
"""How often the tensors of a file may claim its bytes: tied weights claim them twice."""
MAKERS = {"builtins bytearray", "__builtin__ bytearray", "_codecs encode"}
"""What a pickle of weights may not call: memory of any size from a number, and slow encodings."""


class _Directory:
    """A file for `zipfile` that refuses to read a large directory; its entries are read in small blocks."""

    def __init__(self, file: BufferedReader, path: Path):
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self._read, self._path = file.read, path

    def read(self, size: int = -1) -> bytes:
        data = self._read(min(size, LARGEST_DIRECTORY + 1) if size >= 0 else LARGEST_DIRECTORY + 1)
        if len(data) > LARGEST_DIRECTORY:
            _refuse(self._path, "the directory of its archive is too large")
        return data


def check_pickled(path: Path) -> bool:
    """Whether a PyTorch file is a zip archive.

    Raises CheckpointError if it claims more than it holds, and what zipfile and pickletools raise if it is damaged.
    """
    with reading.open_plain(path) as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            with suppress(ValueError):  # the raw bytes after the pickles, or damage, which torch reports
                for _ in range(5):  # magic number, version, system, tensors, keys
                    _check_steps(file, path)
            return False
        with zipfile.ZipFile(cast(BinaryIO, _Directory(file, path))) as archive:
            _check_archive(archive, path, os.fstat(file.fileno()).st_size)
        return True


def _check_archive(archive: zipfile.ZipFile, path: Path, size: int) -> None:
    entries = archive.infolist()
    claimed = sum(entry.file_size for entry in entries)
    if claimed > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        _refuse(path, f"its archive is compressed, or claims {claimed:,} bytes where the file has {size:,}")
    for entry in entries:
        if entry.filename.endswith(".pkl"):
            if entry.file_size > LARGEST_PICKLE:
                _refuse(path, f"its {shown(entry.filename)} has {entry.file_size:,} bytes without the tensors")
            with archive.open(entry) as pickled:
                _check_steps(pickled, path)


def _check_steps(file: IO[bytes], path: Path) -> None:
    """Refuses a pickle with too many instructions or a call of `MAKERS`. Raises ValueError for a damaged one."""
    for count, (code, argument, _) in enumerate(pickletools.genops(file)):
        if count > MOST_STEPS:
            _refuse(path, f"its pickle has more than {MOST_STEPS:,} instructions")
        if code.name == "GLOBAL" and argument in MAKERS:
            _refuse(path, f"its pickle calls {argument}; save a state dict of tensors alone")


def check_tensors(tensors: Mapping[Any, Tensor], path: Path) -> None:
    """Refuses tensors that claim more bytes than their file holds, or are of a kind that stores no weights."""
    if len(tensors) > MOST_TENSORS:
        _refuse(path, f"it has {len(tensors):,} tensors, more than {MOST_TENSORS:,}")
    total, size = 0, path.stat().st_size
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            _refuse(path, f"a tensor has the name {shown(name)}, which is no text")
        if tensor.is_nested or tensor.is_quantized:
            _refuse(path, f"{shown(name)} is quantised or nested; weights must be plain tensors")
        if tensor.layout is not torch.strided or tensor.is_meta:
            continue  # without bytes; `fit_weights` reports them
        if tensor.is_neg() or tensor.is_conj():
            _refuse(path, f"{shown(name)} is a negated or conjugated view; weights must be plain tensors")
        claimed, stored = tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes()
        if claimed > stored:
            _refuse(
                path, f"{shown(name)} claims {claimed:,} bytes by its strides and has {stored:,}; save a copy of it"
            )
        total += claimed
    if total > SHARED * size:
        _refuse(path, f"its tensors share their bytes and claim {total:,}, the file has {size:,}; save copies of them")


def check_safetensors(path: Path) -> None:
    """Refuses a header with too many tensors. Raises OSError, and ValueError for one that is too large or damaged.

    The library compares shapes and offsets with the size of the file.
    """
    with reading.open_plain(path) as file:
        size, start = os.fstat(file.fileno()).st_size, file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, reading.LARGEST):
            raise ValueError(f"its header claims {length:,} of {size:,} bytes")
        header = reading.parse_json(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    if len(header.keys() - {"__metadata__"}) > MOST_TENSORS:
        _refuse(path, f"it has {len(header):,} tensors, more than {MOST_TENSORS:,}")


def _refuse(path: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{path} is refused: {why}")
