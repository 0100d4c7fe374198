"""The flavour cuda generates what the flavour ort generates: on the CPU, and on a device through WebGPU.

The device is SwiftShader, a Vulkan driver in software that Chromium brings, so these tests need no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from blt_export import pipeline
from blt_runtime import Model
from blt_runtime.backends.device import StepBuffer, Transfers
from blt_runtime.backends.onnx import DeviceSession, OnnxBackend, load_library
from blt_runtime.backends.providers import PROVIDERS, open_session
from blt_runtime.bundle.bundle import Bundle as Files
from blt_runtime.bundle.spec import GraphSpec, TensorSpec
from blt_runtime.errors import BackendError
from tests.exports import prepare
from tests.runtime.device_backend import IDS, assert_streams_equal
from tests.webgpu import require_webgpu

VARIANTS = ("cross_windows_own_heads_newlines", "no_hash_space_causal_latent")
WEIGHT = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
Bundle = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """(variant, flavour) -> its folder, exported once."""
    done: dict[tuple[str, str], Path] = {}

    def export(variant: str, flavour: str) -> Path:
        if (variant, flavour) not in done:
            folder = tmp_path_factory.mktemp("cuda") / flavour
            pipeline.run(prepare(variant, flavour, capacity=192), folder)
            done[variant, flavour] = folder
        return done[variant, flavour]

    return export


@pytest.fixture(params=["cpu", "webgpu"])
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "webgpu":
        require_webgpu(monkeypatch)
    return name


@pytest.mark.parametrize("provider", ["webgpu"], indirect=True)
class TestCaptures:
    """Calls of decode steps, captured and replayed. WebGPU ignores windows then, so it captures only on request."""

    def test_replays_compute_what_the_cpu_computes(self, bundle: Bundle, provider: str) -> None:
        opened = Files.open(bundle("bytes_no_window", "cuda"))
        backends = OnnxBackend(opened, resident=True), OnnxBackend(opened, provider=provider, capture=True)
        want, stream = (Model(backend.spec, backend, opened.hash_tables()).stream(bos=False) for backend in backends)
        for some in (want, stream):
            some.append_ids(IDS[:9])
        for end in range(10, 30):
            for some in (want, stream):
                some.append_ids(IDS[end - 1 : end])
            np.testing.assert_allclose(stream.logits, want.logits, atol=2e-5)
        sessions = [backends[1].session(name) for name in backends[1].spec.graphs]
        assert all(session.captured >= 1 for session in sessions if isinstance(session, DeviceSession))
        assert backends[1].counts is not None
        before = replace(backends[1].counts)
        stream.append_ids(IDS[29:30])
        found = backends[1].counts.since(before)
        assert (found.launches, found.unknown) == (len(sessions), 0)  # a replay is one
        assert 0 < found.waits < len(sessions)  # runs do not wait, results do

    def test_a_replay_of_something_else_is_found(self, provider: str, caplog: pytest.LogCaptureFixture) -> None:
        """A graph that ends in Unsqueeze repeats its first output for ever: no call of it is captured."""
        session = _ending_in_unsqueeze(provider)
        x, y = (StepBuffer(tensor.dtype, tensor.resolve()) for tensor in (*session.spec.inputs, *session.spec.outputs))
        call = session.bind({"x": x, "y": y})
        assert "graph 'encoder' replays wrongly on this device: its calls are not captured" in caplog.text
        assert session.captured == 0
        for number in (1.0, 2.0):
            x.array[:] = number
            call()
            np.testing.assert_allclose(y.array[0], x.array @ WEIGHT, rtol=1e-5)

    def test_windows_are_refused(self, bundle: Bundle, provider: str) -> None:
        with pytest.raises(BackendError, match=r"webgpu ignores attention windows .* 'e\w+' has one"):
            OnnxBackend(Files.open(bundle(VARIANTS[0], "cuda")), provider=provider, capture=True)
        with pytest.raises(BackendError, match="provider cpu captures no calls"):
            OnnxBackend(Files.open(bundle(VARIANTS[0], "cuda")), capture=True)


def _ending_in_unsqueeze(provider: str) -> DeviceSession:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [1, 64]), ("y", [1, 1, 64])))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Unsqueeze", ["m", "axes"], ["y"])]
    constants = [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(np.array([1]), "axes")]
    graph = helper.make_graph(nodes, "graph", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    library, known = load_library("1.32"), PROVIDERS[provider]
    session = open_session(library, known, model.SerializeToString(), library.SessionOptions(), capture=True)
    tensors = TensorSpec("x", "float32", (1, 64)), TensorSpec("y", "float32", (1, 1, 64))
    spec = GraphSpec("encoder", tensors[:1], tensors[1:], {}, None)
    return DeviceSession(session, spec, Transfers(library, str(known.device), session, spec), captures=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_streams_equal_those_of_the_flavour_ort(bundle: Bundle, variant: str, provider: str) -> None:
    model = Model.open(bundle(variant, "cuda"), provider=provider)
    assert_streams_equal(model, Model.open(bundle(variant, "ort")).stream(bos=False), 12)
