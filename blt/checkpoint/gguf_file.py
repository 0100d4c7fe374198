"""The header of a GGUF file, read in the order of the format and within the bounds of the file.

The library `gguf` builds a list of arrays for every element of every array, before it looks at the size of the file: a
header of 40 bytes can claim 2^60 elements. Here a length is compared with the rest of the file first, arrays are
skipped, and the library only dequantises. Raises ValueError for a damaged file.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blt.checkpoint.claims import MOST_TENSORS
from blt_runtime import reading
from blt_runtime.errors import shown

VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_FIELDS = 10_000
MOST_STRINGS = 1 << 21
"""Most strings of all arrays: a vocabulary and its merges have up to a million."""
LONGEST_STRING = 1 << 20
MOST_AXES = 4
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in the file: its type's number, its shape in bytes (the last axis is a row's), and where it begins."""

    type: int
    shape: tuple[int, ...]
    begin: int


class GGUFFile:
    """Fields (scalars and strings) and tensors of a GGUF file, which stays memory-mapped.

    blocks: for each type's number the elements and bytes of a block (`gguf.GGML_QUANT_SIZES`).
    """

    def __init__(self, path: Path, blocks: Mapping[int, tuple[int, int]]):
        with reading.open_plain(path) as file:
            try:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise ValueError("it is empty") from None
        self._at, self._strings = 0, 0
        if self._take(4) != b"GGUF" or (version := self._number("I")) not in VERSIONS:
            raise ValueError(f"it does not begin as a GGUF file of version {' or '.join(map(str, VERSIONS))}")
        n_tensors, n_fields = self._number("Q"), self._number("Q")
        if n_tensors > MOST_TENSORS or n_fields > MOST_FIELDS:
            raise ValueError(f"it claims {n_tensors:,} tensors and {n_fields:,} fields (version {version})")
        self.fields: dict[str, Any] = {}
        for _ in range(n_fields):
            name = self._string()
            if name in self.fields:
                raise ValueError(f"the field {shown(name)} is there twice")
            self.fields[name] = self._value(self._number("I"))
        found = [self._tensor() for _ in range(n_tensors)]
        alignment = self.fields.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= mmap.PAGESIZE:
            raise ValueError(f"its alignment is {shown(alignment)}")
        start = -(-self._at // alignment) * alignment
        self.tensors = {
            name: GGUFTensor(kind, _shape(name, sizes, blocks.get(kind)), start + offset)
            for name, kind, sizes, offset in found
        }
        if len(self.tensors) < len(found):
            raise ValueError("a tensor is there twice")
        claimed = [math.prod(tensor.shape) for tensor in self.tensors.values()]
        ends = [tensor.begin + size for tensor, size in zip(self.tensors.values(), claimed, strict=True)]
        if max([*ends, sum(claimed)], default=0) > len(self._data):
            raise ValueError(f"its tensors claim {max(*ends, sum(claimed)):,} bytes and it has {len(self._data):,}")

    def read(self, tensor: GGUFTensor, gguf: Any) -> NDArray[Any]:
        """A copy of a tensor in float32, dequantised by the library, which raises NotImplementedError."""
        data = np.frombuffer(self._data, np.uint8, math.prod(tensor.shape), tensor.begin).reshape(tensor.shape)
        whole: NDArray[Any] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(tensor.type))
        return np.array(whole, np.float32)

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise ValueError(f"it claims {size:,} bytes at {self._at:,} and has {len(self._data):,}")
        taken, self._at = self._data[self._at : end], end
        return taken

    def _number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self._take(struct.calcsize(f"<{kind}")))[0]

    def _string(self) -> str:
        length = self._number("Q")
        if length > LONGEST_STRING:
            raise ValueError(f"it claims a string of {length:,} bytes")
        return self._take(length).decode("utf-8")

    def _value(self, kind: int) -> Any:
        """A scalar or a string; None for an array, which is skipped."""
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise ValueError(f"it has a field of the unknown type {kind}")
        inner, length = self._number("I"), self._number("Q")
        if inner in SCALARS:
            self._skip(length * struct.calcsize(f"<{SCALARS[inner]}"))
        elif inner == STRING:
            self._strings += length
            if self._strings > MOST_STRINGS:
                raise ValueError(f"it claims {self._strings:,} strings")
            for _ in range(length):
                self._skip(self._number("Q"))
        else:
            raise ValueError(f"it has an array of the unsupported type {inner}")

    def _skip(self, size: int) -> None:
        if self._at + size > len(self._data):
            raise ValueError(f"it claims {size:,} bytes at {self._at:,} and has {len(self._data):,}")
        self._at += size

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name, axes = self._string(), self._number("I")
        if axes > MOST_AXES:
            raise ValueError(f"{shown(name)} has {axes:,} axes")
        sizes = tuple(self._number("Q") for _ in range(axes))
        return name, self._number("I"), sizes, self._number("Q")


def _shape(name: str, sizes: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, ...]:
    """The shape in bytes of a tensor with `sizes`, which begin with the innermost axis."""
    if block is None or not sizes or sizes[0] % block[0]:
        raise ValueError(f"{shown(name)} has sizes {shown(sizes)} or a type that do not exist")
    return (*reversed(sizes[1:]), sizes[0] // block[0] * block[1])
