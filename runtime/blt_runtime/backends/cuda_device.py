"""Memory, streams and captured graphs of a CUDA device, as `Device`; `CudaDevice` is the real one.

Addresses are whole numbers. Copies and launches are only requested: their results are there after `wait`.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from ..errors import BackendError, MissingExtra
from .failures import DEAD
from .protocol import Array

_DESTROY = {
    "cudaStream_t": "cudaStreamDestroy",
    "cudaEvent_t": "cudaEventDestroy",
    "cudaGraphExec_t": "cudaGraphExecDestroy",
}


class Device(Protocol):
    """A device with memory of its own. All calls raise BackendError when it has failed."""

    name: str

    def alloc(self, size: int) -> int:
        """The address of `size` bytes with undefined contents. Raises MemoryError."""
        ...

    def free(self, address: int) -> None: ...

    def pinned(self, size: int) -> Array:
        """`size` zeroed bytes of main memory, uint8, that copies read and write directly. Raises MemoryError."""
        ...

    def unpin(self, array: Array) -> None:
        """Frees memory of `pinned`."""
        ...

    def release(self, thing: Any) -> None:
        """Ends a stream, an event or a graph."""
        ...

    def stream(self) -> Any:
        """A queue of requests, which run in order."""
        ...

    def upload(self, address: int, array: Array, stream: Any) -> None:
        """Requests a copy to the device. The array must stay as it is until `wait`."""
        ...

    def download(self, array: Array, address: int, stream: Any) -> None: ...

    def event(self) -> Any: ...

    def record(self, event: Any, stream: Any) -> None:
        """The event happens when all earlier requests of the stream have run."""
        ...

    def follow(self, stream: Any, event: Any) -> None:
        """Later requests of the stream run after the event."""
        ...

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        """A graph of all that `enqueue` requests on the stream, and on streams that follow it. Nothing runs."""
        ...

    def launch(self, graph: Any, stream: Any) -> None: ...

    def wait(self, stream: Any) -> None: ...


class CudaDevice:
    """A CUDA device through `cuda.bindings.runtime`. runtime: that module, given by tests."""

    def __init__(self, index: int = 0, runtime: ModuleType | Any | None = None) -> None:
        self.name, self._index, self._dead = f"cuda:{index}", index, ""
        self._cuda = _bindings() if runtime is None else runtime
        self._threads = threading.local()  # CUDA has a current device for each thread
        self._do("cudaGetDevice")

    def alloc(self, size: int) -> int:
        return int(self._do("cudaMalloc", max(1, size)))

    def free(self, address: int) -> None:
        self._give_back("cudaFree", address)

    def pinned(self, size: int) -> Array:
        address = int(self._do("cudaHostAlloc", size, self._cuda.cudaHostAllocDefault))
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        array[:] = 0
        return array

    def unpin(self, array: Array) -> None:
        self._give_back("cudaFreeHost", array.ctypes.data)

    def release(self, thing: Any) -> None:
        self._give_back(_DESTROY[type(thing).__name__], thing)

    def stream(self) -> Any:
        return self._do("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)

    def upload(self, address: int, array: Array, stream: Any) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._do("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def download(self, array: Array, address: int, stream: Any) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._do("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def event(self) -> Any:
        return self._do("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)

    def record(self, event: Any, stream: Any) -> None:
        self._do("cudaEventRecord", event, stream)

    def follow(self, stream: Any, event: Any) -> None:
        self._do("cudaStreamWaitEvent", stream, event, 0)

    def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
        self._do("cudaStreamBeginCapture", stream, self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed)
        try:
            enqueue()
        except BaseException:
            self._cuda.cudaStreamEndCapture(stream)
            raise
        captured = self._do("cudaStreamEndCapture", stream)
        try:
            return self._do("cudaGraphInstantiate", captured, 0)
        finally:
            self._give_back("cudaGraphDestroy", captured)

    def launch(self, graph: Any, stream: Any) -> None:
        self._do("cudaGraphLaunch", graph, stream)

    def wait(self, stream: Any) -> None:
        self._do("cudaStreamSynchronize", stream)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        free, total = self._do("cudaMemGetInfo")
        return int(free), int(total)

    def _do(self, name: str, *arguments: Any) -> Any:
        """Calls a function of CUDA's runtime. Returns its results without the error code."""
        if self._dead:
            raise BackendError(f"the device {self.name} has failed ({self._dead}): start the process again")
        if not hasattr(self._threads, "ready"):
            self._threads.ready = True
            self._do("cudaSetDevice", self._index)
        error, *results = getattr(self._cuda, name)(*arguments)
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise self._failure(name, error, arguments)
        return results[0] if len(results) == 1 else tuple(results)

    def _give_back(self, name: str, what: Any) -> None:
        """Frees something. A device that has failed frees nothing."""
        if not self._dead:
            self._do(name, what)

    def _failure(self, name: str, error: Any, arguments: tuple[Any, ...]) -> Exception:
        code = getattr(error, "name", str(error))
        if code == "cudaErrorMemoryAllocation":
            size = f"{arguments[0]:,} bytes" if name in ("cudaMalloc", "cudaHostAlloc") else f"room for {name}"
            return MemoryError(f"no {size} on the device {self.name}")
        if code in DEAD:
            self._dead = code
        return BackendError(f"{name} failed on the device {self.name}: {code}")


def _bindings() -> ModuleType:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingExtra("cuda-bindings", "tensorrt") from error
