"""Read bandwidth of a device's memory, measured through ONNX Runtime's provider for the device."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import replace

from blt.bench.machine import SWEEPS, Bandwidth
from blt_runtime.backends.device import DeviceBuffer, Transfers
from blt_runtime.backends.onnx import DeviceSession, import_library
from blt_runtime.backends.protocol import Backend, Call, HostBuffer
from blt_runtime.backends.providers import PROVIDERS, check_placement, open_session
from blt_runtime.bundle.spec import GraphSpec, TensorSpec
from blt_runtime.errors import BackendError

log = logging.getLogger("blt.bench")
SIZES = {"cuda": 1 << 30, "gpu": 1 << 27}
"""Bytes of a buffer by device. WebGPU binds no more than 128 MiB unless a limit is raised."""
AT_ONCE = 4
"""Copies, or products, that the host waits for together."""
MULTIPLE = 64
SLOW_S = 2.0
"""Seconds of a method's second call from which on it is left out: it is limited by something else than memory."""


class DeviceReader:
    """Copies and products in the memory of a device; `best` is the fastest sweep of all samples.

    A copy of n bytes reads n and writes n, and counts as 2 n. A product of a vector with a square matrix of n bytes
    reads n. size: bytes of each of two buffers, which the backend makes. Raises MemoryError or BackendError.
    """

    def __init__(self, backend: Backend, device: str, size: int | None = None) -> None:
        side = math.isqrt((size or SIZES[device]) // 4) // MULTIPLE * MULTIPLE
        self._library = import_library()
        self._matrices = [_device_buffer(backend, (side, side)) for _ in range(2)]
        self._small = _device_buffer(backend, (1,))
        n_bytes = 4 * side * side
        self._methods: dict[str, tuple[int, Call]] = {
            "copies": (2 * n_bytes * AT_ONCE, self._copy),
            "products": (n_bytes * AT_ONCE, self._product(device, side)),
        }
        self.best = Bandwidth(bytes_per_s=0.0, method="", buffer_bytes=n_bytes, threads=None)
        for name, (_, call) in tuple(self._methods.items()):
            call()  # a first call compiles kernels
            began = time.perf_counter()
            call()
            if time.perf_counter() - began > SLOW_S and len(self._methods) > 1:
                del self._methods[name]

    def sample(self) -> Bandwidth:
        """SWEEPS more sweeps of each method; returns the best of all samples. Raises BackendError."""
        for name, (moved, call) in self._methods.items():
            for _ in range(SWEEPS):
                began = time.perf_counter()
                call()
                rate = moved / (time.perf_counter() - began)
                if rate > self.best.bytes_per_s:
                    self.best = replace(self.best, bytes_per_s=rate, method=name)
        return self.best

    def close(self) -> None:
        """Frees the buffers."""
        self._methods.clear()
        self._matrices.clear()

    def _copy(self) -> None:
        source, target = (matrix.value for matrix in self._matrices)
        try:
            for _ in range(AT_ONCE):
                self._library.copy_tensors([source], [target])
            self._small.read()  # waits for the copies, which the device was asked for earlier
        except RuntimeError as error:
            raise BackendError(f"copies in the memory of the device failed: {error}") from error

    def _product(self, device: str, side: int) -> Call:
        provider = next(provider for provider in PROVIDERS.values() if provider.device == device)
        vector, matrix = (1, side), (side, side)
        tensors = [TensorSpec(name, "float32", shape) for name, shape in (("x", vector), ("w", matrix), ("y", vector))]
        spec = GraphSpec("products", tuple(tensors[:2]), tuple(tensors[2:]), {}, None)
        options = self._library.SessionOptions()
        options.log_severity_level = 3
        try:
            session = open_session(self._library, provider, products(side, AT_ONCE), options)
        except Exception as error:  # onnxruntime's own classes share no public base
            raise BackendError(f"the device {device} runs no products: {error}") from error
        check_placement(session, provider, spec.name)
        ends = {name: HostBuffer("float32", vector) for name in ("x", "y")}
        transfers = Transfers(self._library, device, session, spec)
        return DeviceSession(session, spec, transfers).bind({**ends, "w": self._matrices[0]})


def device_reader(backend: Backend) -> tuple[bool, DeviceReader | None]:
    """Whether the model's memory is that of a device, and what measures it; None where nothing can, which is logged."""
    memory = backend.buffer("float32", (1,), "device")
    if isinstance(memory, HostBuffer):
        return False, None
    if not isinstance(memory, DeviceBuffer):
        return True, None
    try:
        return True, DeviceReader(backend, memory.device)
    except (BackendError, MemoryError) as error:
        log.warning("the read bandwidth of the device is unknown: %s", error)
        return True, None


def _device_buffer(backend: Backend, shape: tuple[int, ...]) -> DeviceBuffer:
    buffer = backend.buffer("float32", shape, "device")
    assert isinstance(buffer, DeviceBuffer)
    return buffer


# --- the graph ---------------------------------------------------------------------------------------------
# As much of protobuf's wire format as it takes to write one chain of products without the library onnx.


def products(side: int, n: int) -> bytes:
    """An ONNX model: y [1, side] is x [1, side] times w [side, side], `n` times."""
    names = ["x", *(f"x{i}" for i in range(1, n)), "y"]
    nodes = (_node("MatMul", (names[i], "w"), names[i + 1]) for i in range(n))
    inputs = _tensor("x", (1, side)), _tensor("w", (side, side))
    graph = (
        *((1, node) for node in nodes),
        (2, b"products"),
        *((11, t) for t in inputs),
        (12, _tensor("y", (1, side))),
    )
    return _message([(1, 10), (7, _message(graph)), (8, _message([(2, 20)]))])


def _node(operator: str, inputs: Iterable[str], output: str) -> bytes:
    return _message([*((1, name.encode()) for name in inputs), (2, output.encode()), (4, operator.encode())])


def _tensor(name: str, shape: tuple[int, ...]) -> bytes:
    sizes = _message([(1, _message([(1, size)])) for size in shape])
    return _message([(1, name.encode()), (2, _message([(1, _message([(1, 1), (2, sizes)]))]))])


def _message(fields: Iterable[tuple[int, int | bytes]]) -> bytes:
    """Fields by number: whole numbers as varints, bytes with their length."""
    written = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            written += _varint(number << 3) + _varint(value)
        else:
            written += _varint(number << 3 | 2) + _varint(len(value)) + value
    return bytes(written)


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes([*written, value])
