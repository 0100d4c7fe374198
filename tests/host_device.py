"""A device in main memory, for tests. Requests run when their stream is waited for, and no earlier.

Streams of one wait run in the reverse order of their creation as far as events allow, so that an event that is missing
shows. New memory holds 0xA5. Every access is checked against what is allocated.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blt_runtime.backends.protocol import Array

Request = tuple[str, Any]


class HostEvent:
    happened = False


class HostStream(deque[Request]):
    pass


@dataclass
class HostGraph:
    """What was requested, by stream."""

    requests: list[tuple[HostStream, Request]] = field(default_factory=list)


class HostDevice:
    def __init__(self) -> None:
        self.name = "host:0"
        self.live: dict[int, Any] = {}
        self.pinned_bytes = self.things = self.waits = self.copies = self.launches = 0
        self.room = 1 << 40
        self._streams: list[HostStream] = []
        self._captured: HostGraph | None = None

    def alloc(self, size: int) -> int:
        if size > self.room:
            raise MemoryError(f"no {size:,} bytes on the device {self.name}")
        memory = (ctypes.c_uint8 * max(1, size))()
        address = ctypes.addressof(memory)
        ctypes.memset(address, 0xA5, size)
        self.live[address] = memory
        return address

    def free(self, address: int) -> None:
        del self.live[address]

    def pinned(self, size: int) -> Array:
        self.pinned_bytes += size
        return np.zeros(size, np.uint8)

    def unpin(self, array: Array) -> None:
        self.pinned_bytes -= len(array)

    def release(self, thing: Any) -> None:
        self.things -= 1
        if isinstance(thing, HostStream):
            self._streams = [stream for stream in self._streams if stream is not thing]

    def stream(self) -> HostStream:
        self.things += 1
        self._streams.append(HostStream())
        return self._streams[-1]

    def event(self) -> HostEvent:
        self.things += 1
        return HostEvent()

    def view(self, address: int, size: int) -> Array:
        """`size` bytes of device memory. Raises ValueError for an address outside of it."""
        for start, memory in self.live.items():
            if start <= address and address + size <= start + len(memory):
                return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        raise ValueError("an illegal address: no memory of the device")

    def request(self, stream: HostStream, kind: str, what: Any) -> None:
        if self._captured is not None:
            self._captured.requests.append((stream, (kind, what)))
        else:
            stream.append((kind, what))

    def upload(self, address: int, array: Array, stream: HostStream) -> None:
        def copy() -> None:
            self.copies += 1
            self.view(address, array.nbytes)[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

        self.request(stream, "run", copy)

    def download(self, array: Array, address: int, stream: HostStream) -> None:
        assert array.flags.c_contiguous

        def copy() -> None:
            self.copies += 1
            array.reshape(-1).view(np.uint8)[:] = self.view(address, array.nbytes)

        self.request(stream, "run", copy)

    def record(self, event: HostEvent, stream: HostStream) -> None:
        if self._captured is None:
            event.happened = False
        self.request(stream, "record", event)

    def follow(self, stream: HostStream, event: HostEvent) -> None:
        self.request(stream, "follow", event)

    def capture(self, stream: HostStream, enqueue: Callable[[], None]) -> HostGraph:
        self.things += 1
        self._captured = HostGraph()
        try:
            enqueue()
            return self._captured
        finally:
            self._captured = None

    def launch(self, graph: HostGraph, stream: HostStream) -> None:
        self.launches += 1
        for request in dict.fromkeys(what for _, (kind, what) in graph.requests if kind == "record"):
            request.happened = False
        for of, request in graph.requests:
            of.append(request)

    def wait(self, stream: HostStream) -> None:
        self.waits += 1
        while stream:
            if not any(self._advance(of) for of in reversed(self._streams)):
                raise RuntimeError("a stream waits for an event that nothing records")

    def _advance(self, stream: HostStream) -> bool:
        moved = False
        while stream:
            kind, what = stream[0]
            if kind == "follow" and not what.happened:
                return moved
            stream.popleft()
            moved = True
            if kind == "record":
                what.happened = True
            elif kind == "run":
                what()
        return moved
