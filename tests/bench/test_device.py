"""The read bandwidth of a device's memory, on SwiftShader through WebGPU. No test depends on a time."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from blt.bench import device
from blt.bench.device import DeviceReader, device_reader, products
from blt_runtime.backends.device import DeviceBuffer
from blt_runtime.backends.null import NullBackend, null_spec
from blt_runtime.backends.onnx import load_library
from blt_runtime.backends.protocol import Buffer, Place, Session
from tests.webgpu import require_webgpu


class WebGpu:
    """A backend without graphs. `made` has its buffers."""

    name = "onnx"

    def __init__(self) -> None:
        self.made: list[DeviceBuffer] = []

    def session(self, group: str) -> Session:
        raise NotImplementedError

    def buffer(self, dtype: str, shape: tuple[int, ...], place: Place = "host") -> Buffer:
        self.made.append(DeviceBuffer(load_library("1.32"), "gpu", dtype, shape))
        return self.made[-1]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> WebGpu:
    require_webgpu(monkeypatch)
    return WebGpu()


def test_the_graph_is_a_chain_of_products() -> None:
    content = products(64, 3)
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    x, w = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((1, 64), (64, 64)))
    np.testing.assert_allclose(session.run(["y"], {"x": x, "w": w})[0], x @ w @ w @ w, rtol=1e-3, atol=1e-3)


def test_copies_and_products_run_on_the_device(backend: WebGpu) -> None:
    reader = DeviceReader(backend, "gpu", 1 << 16)
    source, target = backend.made[:2]
    source.write(np.full(source.shape, 0.5, np.float32))
    best = reader.sample()
    assert source.shape == target.shape == (128, 128)
    assert (best.buffer_bytes, best.threads) == (1 << 16, None)
    assert best.bytes_per_s > 0
    assert best.method in ("copies", "products")
    np.testing.assert_array_equal(target.read(), source.read())
    assert reader.sample().bytes_per_s >= best.bytes_per_s
    reader.close()


def test_a_method_that_something_else_limits_is_left_out(backend: WebGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "SLOW_S", -1.0)
    reader = DeviceReader(backend, "gpu", 1 << 16)
    assert reader.sample().method == "products"  # the last one stays


def test_a_device_without_room_is_unknown_and_logged(
    backend: WebGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise MemoryError("no 1,073,741,824 bytes on the device gpu")

    monkeypatch.setattr(device, "DeviceReader", full)
    assert device_reader(backend) == (True, None)
    assert "the read bandwidth of the device is unknown: no 1,073,741,824 bytes" in caplog.text


def test_main_memory_has_no_reader() -> None:
    assert device_reader(NullBackend(null_spec())) == (False, None)
