"""Blocks of main memory with a twin on a device, which the small buffers of decode steps are parts of.

One transfer then moves all inputs of a call, or all its results.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from .protocol import Array, HostBuffer, storage

ALIGNMENT = 256


class Block:
    """`bytes` of main memory, and the `address` of as many on the device."""

    def __init__(self, bytes_N: Array, address: int) -> None:
        self.bytes, self.address, self._used = bytes_N, address, 0

    def take(self, size: int) -> int | None:
        """The offset of `size` free bytes, if there are as many."""
        if self._used + size > len(self.bytes):
            return None
        offset, self._used = self._used, self._used + -(-size // ALIGNMENT) * ALIGNMENT
        return offset


class BlockBuffer(HostBuffer):
    """A part of a block."""

    def __init__(self, block: Block, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.block, self.offset = block, offset
        size = math.prod(shape) * dtype.itemsize
        self.array = block.bytes[offset : offset + size].view(dtype).reshape(shape)

    def part(self, start: int, shape: tuple[int, ...]) -> BlockBuffer:
        return BlockBuffer(self.block, self.offset + start * self.dtype.itemsize, self.dtype, shape)

    @property
    def address(self) -> int:
        """Of its twin on the device."""
        return self.block.address + self.offset


class Blocks:
    """Makes buffers in blocks of at least `size` bytes, one kind of block for each place. Blocks live as long as their
    buffers. make: a block of that many bytes."""

    def __init__(self, size: int, make: Callable[[int], Block]) -> None:
        self._size, self._make, self._lock = size, make, threading.Lock()
        self._newest: dict[str, weakref.ref[Block]] = {}

    def buffer(self, dtype: str, shape: tuple[int, ...], place: str) -> BlockBuffer:
        """New memory, zeroed. Raises MemoryError."""
        kind = storage(dtype)
        size = math.prod(shape) * kind.itemsize
        with self._lock:
            known = self._newest.get(place)
            block = known() if known is not None else None
            offset = None if block is None else block.take(size)
            if block is None or offset is None:
                block = self._make(max(self._size, size))
                self._newest[place], offset = weakref.ref(block), block.take(size)
        assert offset is not None
        return BlockBuffer(block, offset, kind, shape)
