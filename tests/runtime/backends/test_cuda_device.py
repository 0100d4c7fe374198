"""The CUDA device, on a stand-in for CUDA's runtime: what is called, and what each error becomes."""

from __future__ import annotations

import enum
import importlib
import threading
from typing import Any

import numpy as np
import pytest

from blt_runtime.backends.cuda_device import _DESTROY, CudaDevice
from blt_runtime.backends.failures import DEAD
from blt_runtime.errors import BackendError


class cudaError_t(enum.Enum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorIllegalAddress = 700
    cudaErrorInvalidValue = 1


class Runtime:
    """Answers every function with success, or with the error that was set for it."""

    cudaError_t = cudaError_t
    cudaHostAllocDefault = cudaStreamNonBlocking = cudaEventDisableTiming = 0

    class cudaMemcpyKind:
        cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost = "up", "down"

    class cudaStreamCaptureMode:
        cudaStreamCaptureModeRelaxed = 1

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.errors: dict[str, cudaError_t] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            error = self.errors.get(name, cudaError_t.cudaSuccess)
            return (error, *{"cudaMemGetInfo": (1, 2)}.get(name, (4096,)))

        return call


@pytest.fixture
def runtime() -> Runtime:
    return Runtime()


def test_copies_name_their_direction_and_size(runtime: Runtime) -> None:
    device, array = CudaDevice(1, runtime), np.zeros(3, np.float32)
    address = device.alloc(12)
    device.upload(address, array, "stream")
    device.download(array, address, "stream")
    host = array.ctypes.data
    assert runtime.calls == [
        ("cudaSetDevice", 1),
        ("cudaGetDevice",),
        ("cudaMalloc", 12),
        ("cudaMemcpyAsync", 4096, host, 12, "up", "stream"),
        ("cudaMemcpyAsync", host, 4096, 12, "down", "stream"),
    ]
    assert device.memory() == (1, 2)


def test_a_capture_ends_also_when_a_request_fails(runtime: Runtime) -> None:
    device = CudaDevice(0, runtime)
    with pytest.raises(ZeroDivisionError):
        device.capture("stream", lambda: 1 / 0)  # type: ignore[arg-type]
    assert [name for name, *_ in runtime.calls][2:] == ["cudaStreamBeginCapture", "cudaStreamEndCapture"]
    device.capture("stream", lambda: None)
    assert [name for name, *_ in runtime.calls][-2:] == ["cudaGraphInstantiate", "cudaGraphDestroy"]


def test_missing_memory_is_a_memory_error_with_the_size(runtime: Runtime) -> None:
    device = CudaDevice(0, runtime)
    runtime.errors["cudaMalloc"] = cudaError_t.cudaErrorMemoryAllocation
    with pytest.raises(MemoryError, match="no 1,000,000 bytes on the device cuda:0"):
        device.alloc(1_000_000)
    del runtime.errors["cudaMalloc"]
    assert device.alloc(10) == 4096


def test_other_errors_name_the_call(runtime: Runtime) -> None:
    device = CudaDevice(0, runtime)
    runtime.errors["cudaGraphLaunch"] = cudaError_t.cudaErrorInvalidValue
    with pytest.raises(BackendError, match="cudaGraphLaunch failed on the device cuda:0: cudaErrorInvalidValue"):
        device.launch("graph", "stream")
    device.wait("stream")


def test_a_device_that_failed_stays_failed(runtime: Runtime) -> None:
    device = CudaDevice(0, runtime)
    runtime.errors["cudaStreamSynchronize"] = cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(BackendError, match="cudaErrorIllegalAddress"):
        device.wait("stream")
    runtime.errors.clear()
    with pytest.raises(BackendError, match=r"the device cuda:0 has failed \(cudaErrorIllegalAddress\): start"):
        device.alloc(1)
    before = len(runtime.calls)
    device.free(4096)  # by finalizers, which must not fail
    assert len(runtime.calls) == before


def test_each_thread_uses_this_device(runtime: Runtime) -> None:
    device = CudaDevice(3, runtime)
    thread = threading.Thread(target=device.alloc, args=(8,))
    thread.start()
    thread.join()
    device.alloc(9)
    assert runtime.calls[-3:] == [("cudaSetDevice", 3), ("cudaMalloc", 8), ("cudaMalloc", 9)]


def test_all_names_exist_in_the_bindings() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    used = Runtime()
    device = CudaDevice(0, used)
    device.free(device.alloc(1))
    for name in ("stream", "event"):
        getattr(device, name)()
    device.upload(1, np.zeros(1), 0)
    device.download(np.zeros(1), 1, 0)
    device.record(0, 0)
    device.follow(0, 0)
    device.capture(0, lambda: None)
    device.launch(0, 0)
    device.wait(0)
    device.unpin(np.zeros(1, np.uint8))
    device.memory()
    names = {name for name, *_ in used.calls} | set(_DESTROY) | set(_DESTROY.values()) | {"cudaHostAlloc"}
    assert [name for name in sorted(names) if not hasattr(real, name)] == []
    assert {name: getattr(real.cudaError_t, name).value for name in DEAD} == DEAD
    for kind, members in (
        (real.cudaMemcpyKind, Runtime.cudaMemcpyKind),
        (real.cudaStreamCaptureMode, Runtime.cudaStreamCaptureMode),
    ):
        assert all(hasattr(kind, name) for name in vars(members) if name.startswith("cuda"))
    for name in ("cudaHostAllocDefault", "cudaStreamNonBlocking", "cudaEventDisableTiming"):
        assert hasattr(real, name)


def test_without_the_bindings_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(BackendError, match=r"cuda-bindings.*blt-(lm|runtime)\[tensorrt\]"):
        CudaDevice()
