"""The interface of a backend: buffers, and sessions that run one graph on buffers bound beforehand.

A stream owns buffers; a session is shared and read-only. `bind` is called once per shape, and the callable
that it returns once per byte, so expensive work belongs in `bind`. Outputs that a GraphSpec aliases to an
input are bound to the same buffer.

A buffer has a place. "host": numpy reads and writes it. A device copies it in before a call that reads it, and out
after a call that writes it. "step" and "result": the same for the small inputs and for the results of a decode step. A
device keeps those of a stream together, so that one transfer moves all of them. "device": only graphs read and write
it, so it never leaves the device. On the CPU all are main memory.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ..bundle.spec import GraphSpec
from ..errors import BackendError

Array = npt.NDArray[Any]
Call = Callable[[], None]
Place = Literal["host", "step", "result", "device"]
Part = tuple[slice, ...]
"""A part of a buffer: one slice for each of its first dimensions."""
ALIGNMENT = 64
MAPPED_FROM = 1 << 20
"""Bytes of the smallest array that is mapped separately."""


class Buffer(Protocol):
    """Memory of fixed shape and element type that a session reads and writes in place."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def array(self) -> Array:
        """Host view of the memory: the next call reads what is written here, and writes its results here. Raises
        BackendError for memory of a device."""
        ...

    def part(self, start: int, shape: tuple[int, ...]) -> Buffer:
        """A buffer of another shape over the same memory, from element `start` on. Raises BackendError for memory of a
        device."""
        ...

    def read(self, part: Part = ()) -> Array:
        """A copy on the host."""
        ...

    def write(self, array: Array, part: Part = ()) -> None:
        """Replaces a part of the contents."""
        ...


class Session(Protocol):
    """One graph, ready to run. Shared by streams and threads."""

    @property
    def spec(self) -> GraphSpec: ...

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        """A call that runs the graph on exactly these buffers (every input and output by name).

        Raises BackendError if a tensor is missing or does not fit; the call raises it when it fails, and MemoryError
        if memory runs out.
        """
        ...


class Backend(Protocol):
    """Runs a model's graphs. `name` is for messages."""

    @property
    def name(self) -> str: ...

    def session(self, group: str) -> Session:
        """The session of the graph "entropy", "encoder", "latent" or "decoder"; the same one every time."""
        ...

    def buffer(self, dtype: str, shape: tuple[int, ...], place: Place = "host") -> Buffer:
        """New memory, zeroed. Raises MemoryError."""
        ...


@runtime_checkable
class RowBackend(Backend, Protocol):
    """A backend with batched graphs."""

    def row_session(self, group: str) -> Session:
        """The session of a batched graph (`spec.row_spec`); the same one every time."""
        ...


@runtime_checkable
class PaddedBackend(Backend, Protocol):
    """A backend with batched graphs whose rows are padded to one length. `rows`: streams of every call."""

    @property
    def rows(self) -> int: ...

    def padded_session(self, group: str) -> Session:
        """The session of a padded graph (`spec.padded_spec`); the same one every time."""
        ...


@runtime_checkable
class ComposingBackend(Backend, Protocol):
    """A backend that runs bound calls of one stream beside each other."""

    def compose(self, chains: Sequence[Sequence[Call]]) -> Call:
        """One call that runs the chains beside each other, and the calls of a chain in order. When it returns, the
        results of all are there. Only calls bound by this backend's sessions are accepted (BackendError)."""
        ...


class HostBuffer:
    """A Buffer in main memory: a numpy array at an aligned address."""

    def __init__(self, dtype: str | np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.array = aligned_zeros(storage(dtype), shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def part(self, start: int, shape: tuple[int, ...]) -> HostBuffer:
        other = type(self).__new__(type(self))
        other.array = self.array.reshape(-1)[start : start + math.prod(shape)].reshape(shape)
        return other

    def read(self, part: Part = ()) -> Array:
        return self.array[part].copy()

    def write(self, array: Array, part: Part = ()) -> None:
        self.array[part] = array


class OpaqueBuffer:
    """A Buffer in memory that the host cannot see: a backend copies all of it, in and out."""

    def __init__(self, device: str, dtype: str, shape: tuple[int, ...]) -> None:
        self.device, self.shape, self.dtype = device, shape, storage(dtype)

    @property
    def array(self) -> Array:
        raise BackendError(f"memory of the device {self.device} has no view on the host")

    def part(self, start: int, shape: tuple[int, ...]) -> Buffer:
        raise BackendError(f"batched streams need batched graphs: memory of the device {self.device} has no parts")

    def copy_out(self, whole: Array) -> None:
        """Copies the contents into a contiguous array of this shape and type."""
        raise NotImplementedError

    def copy_in(self, whole: Array) -> None:
        """Replaces the contents by those of a contiguous array."""
        raise NotImplementedError

    def read(self, part: Part = ()) -> Array:
        whole = np.empty(self.shape, self.dtype)
        self.copy_out(whole)
        return whole[part].copy() if part else whole

    def write(self, array: Array, part: Part = ()) -> None:
        whole = array
        if part or array.shape != self.shape:
            whole = self.read()
            whole[part] = array
        self.copy_in(np.ascontiguousarray(whole, self.dtype))


def storage(dtype: str | np.dtype[Any]) -> np.dtype[Any]:
    """numpy's type for an element type; bfloat16 is stored as uint16."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


def aligned_zeros(dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Zeroed array at an address that is a multiple of 64 (a cache line). Untouched pages cost no memory.

    Raises MemoryError.
    """
    size = math.prod(shape) * dtype.itemsize
    raw = _pages(size) if size >= MAPPED_FROM else np.zeros(size + ALIGNMENT, dtype=np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)


def _pages(size: int) -> npt.NDArray[np.uint8]:
    """Zeroed memory in small pages where the system has others. numpy requests pages of 2 MB, and a cache's heads are
    that far apart, so the first token would touch all of it (1.6 GB at the released 1B's size)."""
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no {size:,} bytes of memory") from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(pages, dtype=np.uint8)
