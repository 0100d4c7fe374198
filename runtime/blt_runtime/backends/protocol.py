"""What a backend must offer: buffers, and sessions that run one graph on buffers bound beforehand.

A stream owns buffers; a session is shared and read-only. `bind` is called once per shape, the callable it
returns once per byte, so everything that costs belongs in `bind`. Outputs that a GraphSpec aliases to an
input are bound to the same buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..spec import GraphSpec

Array = npt.NDArray[Any]
Call = Callable[[], None]
ALIGNMENT = 64


class Buffer(Protocol):
    """Memory of fixed shape and element type that a session reads and writes in place."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def array(self) -> Array:
        """Host view of the memory: writes are seen by the next call, and calls' results are seen here."""
        ...

    def part(self, start: int, shape: tuple[int, ...]) -> Buffer:
        """A buffer of another shape over the same memory, from element `start` on."""
        ...


class Session(Protocol):
    """One graph, ready to run. Shared by streams and threads."""

    @property
    def spec(self) -> GraphSpec: ...

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        """A call that runs the graph on exactly these buffers (every input and output by name).

        Raises BackendError if a tensor is missing or does not fit.
        """
        ...


class Backend(Protocol):
    """Where graphs run. `name` is for messages."""

    @property
    def name(self) -> str: ...

    def session(self, group: str) -> Session:
        """The session of the graph "entropy", "encoder", "latent" or "decoder"; the same one every time."""
        ...

    def buffer(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        """New memory, zeroed."""
        ...


class HostBuffer:
    """A Buffer in main memory: a numpy array at an aligned address."""

    def __init__(self, dtype: str | np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.array = aligned_zeros(np.dtype(dtype), shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def part(self, start: int, shape: tuple[int, ...]) -> HostBuffer:
        other = HostBuffer.__new__(HostBuffer)
        other.array = self.array.reshape(-1)[start : start + math.prod(shape)].reshape(shape)
        return other


def aligned_zeros(dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Zeroed array at an address that is a multiple of 64 (a cache line)."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, dtype=np.uint8)  # calloc: pages that nobody touches cost nothing
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)
