"""TensorRT engines, on a stand-in for TensorRT and a device in main memory: the results of ONNX Runtime's CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from blt_export import bundle as bundles
from blt_export import pipeline
from blt_export.passes import keep_states
from blt_runtime import Model
from blt_runtime.backends.counts import Counts
from blt_runtime.backends.tensorrt import TensorRtBackend
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.bundle.spec import ModelSpec, resident_spec
from blt_runtime.engine.graphs import Graphs
from blt_runtime.engine.memory import Memory
from blt_runtime.errors import BackendError, OutOfMemory
from tests import fake_tensorrt
from tests.exports import prepare
from tests.host_device import HostDevice
from tests.runtime.device_backend import IDS, assert_streams_equal

MOST = {"B": 1, "S": 32, "P": 32, "L": 64, "N": 4096, "R": 4096}
Plans = dict[str, bytes]


def profiles(spec: ModelSpec, most: Mapping[str, int] = MOST) -> dict[str, list[dict[str, Any]]]:
    """One profile a graph, which takes everything up to `most`."""
    least = dict.fromkeys(most, 1)
    return {
        name: [{t.name: (t.resolve(**least), t.resolve(**least), t.resolve(**most)) for t in graph.inputs}]
        for name, graph in spec.graphs.items()
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    state = prepare("cross_windows_own_heads_newlines", "portable", capacity=192, check=False)
    return Bundle.open(pipeline.run(state, tmp_path_factory.mktemp("trt") / "bundle").path)


@pytest.fixture(scope="module", params=["resident", "plain"])
def built(
    request: pytest.FixtureRequest, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelSpec, Plans]:
    """The specification, and a plan for each graph."""
    spec, folder = bundle.manifest.spec, tmp_path_factory.mktemp("plans")
    if request.param == "resident":
        spec = resident_spec(spec, cached=True)
    return spec, plans_of(bundle, spec, folder)


def plans_of(bundle: Bundle, spec: ModelSpec, folder: Path) -> Plans:
    plans = {}
    for name, graph in spec.graphs.items():
        model = ir.load(bundle.graph_file(name))
        path = bundles.write_graph(keep_states.run(model, graph) if spec.resident else model, folder, name)
        plans[name] = fake_tensorrt.plan_of(onnx.load(path), profiles(spec)[name])
    return plans


def backend_of(built: tuple[ModelSpec, Plans], device: HostDevice | None = None, **options: Any) -> TensorRtBackend:
    device = device or HostDevice()
    return TensorRtBackend(*built, fake_tensorrt.module(device), device, **options)


def test_requests_are_those_that_the_device_gets(bundle: Bundle, built: tuple[ModelSpec, Plans]) -> None:
    """Composed steps are one launch each; others are as many as the engines have layers."""
    device = HostDevice()
    backend = backend_of(built, device)
    stream = Model(backend.spec, backend, bundle.hash_tables()).stream()
    list(stream.generate_ids(60, temperature=0.0, stop_at_eos=False))
    stream.rewind(20)  # the same bytes again, whose calls are all bound and probed
    before, patches = replace(backend.counts), len(stream.patch_lengths)
    device.waits = device.copies = device.launches = 0
    list(stream.generate_ids(20, temperature=0.0, stop_at_eos=False))
    closed, found = len(stream.patch_lengths) - patches, backend.counts.since(before)
    assert (found.copies, found.waits) == (device.copies, device.waits)
    if backend.spec.resident:
        assert found == Counts(20 + closed, 0, 2 * (20 + closed), 20 + closed)
        assert device.launches == found.launches
    else:
        layers = {name: backend.session(name).layers or 0 for name in backend.spec.graphs}
        latent = layers.pop("latent")
        assert found.launches == 20 * sum(layers.values()) + closed * latent
    kept = stream.snapshot()
    stream.restore(kept)
    found = backend.counts.since(before)
    assert (found.copies, found.waits) == (device.copies, device.waits)


def test_an_engine_that_does_not_tell_its_layers_is_unknown(bundle: Bundle, built: tuple[ModelSpec, Plans]) -> None:
    backend = backend_of(built)
    for name in backend.spec.graphs:
        backend.session(name).layers = None
    stream = Model(backend.spec, backend, bundle.hash_tables()).stream()
    stream.append("A prompt")
    assert backend.counts.unknown > 0


def test_streams_equal_those_of_the_cpu(bundle: Bundle, built: tuple[ModelSpec, Plans]) -> None:
    backend = backend_of(built)
    model = Model(backend.spec, backend, bundle.hash_tables())
    assert_streams_equal(model, Model.open(bundle.path).stream(bos=False), 30)


def test_drafts_are_accepted_and_rolled_back(bundle: Bundle, built: tuple[ModelSpec, Plans]) -> None:
    backend = backend_of(built)
    streams = Model(backend.spec, backend, bundle.hash_tables()).stream(), Model.open(bundle.path).stream()
    for stream in streams:
        stream.append("abcabc" * 4)
    made = [list(stream.generate_ids(40, temperature=0.0, speculate="lookup", stop_at_eos=False)) for stream in streams]
    assert made[0] == made[1]


class TestForkedSteps:
    @pytest.fixture(scope="class")
    @staticmethod
    def resident(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, Plans]:
        spec = resident_spec(bundle.manifest.spec, cached=True)
        return spec, plans_of(bundle, spec, tmp_path_factory.mktemp("plans"))

    def test_a_byte_is_one_launch_one_wait_and_two_copies(
        self, bundle: Bundle, resident: tuple[ModelSpec, Plans]
    ) -> None:
        device = HostDevice()
        backend = backend_of(resident, device)
        stream = Model(backend.spec, backend, bundle.hash_tables()).stream()
        stream.append("The first bytes make all calls that there are, of short patches and long ones.")
        list(stream.generate_ids(40, temperature=0.0, stop_at_eos=False))
        waits, launches, copies, patches = device.waits, device.launches, device.copies, len(stream.patch_lengths)
        list(stream.generate_ids(20, temperature=0.0, stop_at_eos=False))
        closed = device.launches - launches - 20
        assert closed >= len(stream.patch_lengths) - patches - 1
        assert device.waits - waits == 20 + closed
        assert device.copies - copies == 2 * (20 + closed)

    @pytest.mark.parametrize("lost", range(9))
    def test_a_capture_that_lacks_any_request_is_found(
        self, bundle: Bundle, resident: tuple[ModelSpec, Plans], caplog: pytest.LogCaptureFixture, lost: int
    ) -> None:
        """An upload, a download, an event or an engine that a captured graph forgets."""

        class Forgetful(HostDevice):
            def capture(self, stream: Any, enqueue: Callable[[], None]) -> Any:
                graph = super().capture(stream, enqueue)
                if len(graph.requests) == 9:  # of a token, not of a patch
                    del graph.requests[lost]
                return graph

        backend = backend_of(resident, Forgetful())
        stream = Model(backend.spec, backend, bundle.hash_tables()).stream()
        assert "the graphs entropy, encoder, decoder replay wrongly on the device host:0" in caplog.text
        want = Model.open(bundle.path).stream()
        for some in (stream, want):
            some.append_ids(IDS[1:2])
        np.testing.assert_allclose(stream.logits, want.logits, atol=2e-5)
        if lost == 0:
            with pytest.raises(BackendError, match="replay wrongly"):
                Model(backend.spec, backend_of(resident, Forgetful(), strict=True), bundle.hash_tables()).stream()

    def test_a_second_stream_is_not_probed(self, bundle: Bundle, resident: tuple[ModelSpec, Plans]) -> None:
        device = HostDevice()
        backend = backend_of(resident, device)
        waits = []
        for _ in range(2):
            before = device.waits
            Model(backend.spec, backend, bundle.hash_tables()).stream(bos=False)
            waits.append(device.waits - before)
        assert waits[1] < waits[0] / 2

    def test_calls_of_another_backend_are_refused(self, bundle: Bundle, resident: tuple[ModelSpec, Plans]) -> None:
        with pytest.raises(BackendError, match="only calls of TensorRT engines"):
            backend_of(resident).compose([[lambda: None]])
        backend = backend_of(resident)
        memory = Memory(backend.spec, backend, bundle.hash_tables())
        with pytest.raises(BackendError, match="calls on host buffers cannot be composed"):
            backend.compose([[Graphs(memory, 1, kept=False).call("entropy", 1)]])


def test_memory_is_freed_with_the_streams_and_the_backend(bundle: Bundle, built: tuple[ModelSpec, Plans]) -> None:
    device = HostDevice()
    backend = backend_of(built, device)
    for _ in range(2):
        stream = Model(backend.spec, backend, bundle.hash_tables()).stream()
        stream.append("abc")
        del stream
        gc.collect()
        assert not device.live
        assert device.pinned_bytes == 0
    assert device.things == 1  # the backend's stream


class TestErrors:
    """Each is one line that names the graph."""

    @pytest.fixture
    def plans(self, built: tuple[ModelSpec, Plans]) -> Plans:
        return dict(built[1])

    def fails(self, built: tuple[ModelSpec, Plans], plans: Plans, text: str) -> None:
        with pytest.raises(BackendError, match=text) as caught:
            backend_of((built[0], plans))
        assert "\n" not in str(caught.value)

    def edited(self, built: tuple[ModelSpec, Plans], name: str, edit: Callable[[onnx.ModelProto], None]) -> bytes:
        head = int.from_bytes(built[1][name][8:12], "little")
        model = onnx.load_from_string(built[1][name][12 + head :])
        edit(model)
        return fake_tensorrt.plan_of(model, profiles(built[0])[name])

    def test_a_plan_of_another_version(self, built: tuple[ModelSpec, Plans]) -> None:
        device = HostDevice()
        with pytest.raises(BackendError, match=r"TensorRT 11\.0 refuses the engine of .* run blt build"):
            TensorRtBackend(*built, fake_tensorrt.module(device, version="11.0"), device)

    def test_a_plan_that_is_none(self, built: tuple[ModelSpec, Plans], plans: Plans) -> None:
        plans["latent"] = b"\0" * 64
        self.fails(built, plans, "refuses the engine of the graph 'latent'")

    def test_an_input_that_was_dropped(self, built: tuple[ModelSpec, Plans], plans: Plans) -> None:
        plans["encoder"], plans["entropy"] = plans["entropy"], plans["encoder"]
        self.fails(built, plans, "has other tensors")

    def test_a_cache_that_is_not_written_in_place(self, built: tuple[ModelSpec, Plans], plans: Plans) -> None:
        def copied(model: onnx.ModelProto) -> None:
            node = next(node for node in model.graph.node if "present_key.0" in node.output)
            node.output[0] = "copied"
            model.graph.node.append(onnx.helper.make_node("Identity", ["copied"], ["present_key.0"]))

        plans["entropy"] = self.edited(built, "entropy", copied)
        self.fails(built, plans, "'entropy' does not write 'present_key.0' into 'past_key.0'")

    def test_a_shape_outside_all_profiles(self, bundle: Bundle, built: tuple[ModelSpec, Plans], plans: Plans) -> None:
        head = int.from_bytes(plans["encoder"][8:12], "little")
        model = onnx.load_from_string(plans["encoder"][12 + head :])
        plans["encoder"] = fake_tensorrt.plan_of(model, profiles(built[0], {**MOST, "S": 4})["encoder"])
        backend = backend_of((built[0], plans))
        stream = Model(backend.spec, backend, bundle.hash_tables()).stream(bos=False)
        with pytest.raises(BackendError, match=r"'encoder' has no profile for ids \[1, \d+\], .*: run blt build"):
            stream.append_ids(IDS[:20])

    def test_a_device_that_is_full(self, bundle: Bundle, built: tuple[ModelSpec, Plans]) -> None:
        device = HostDevice()
        backend = backend_of(built, device)
        device.room = 1000
        with pytest.raises(OutOfMemory, match=r"no [0-9,]+ bytes on the device host:0"):
            Model(backend.spec, backend, bundle.hash_tables()).stream()
        gc.collect()
        assert not device.live

    def test_a_tensor_without_a_buffer(self, built: tuple[ModelSpec, Plans]) -> None:
        with pytest.raises(BackendError, match="graph 'encoder': nothing is bound to"):
            backend_of(built).session("encoder").bind({})

    @pytest.mark.parametrize(
        ("shape", "dtype"), [((1, 2), "int64"), ((1, 1, 1), "int64"), ((1, 1), "int32"), ((1, 1), "float32")]
    )
    def test_buffers_that_do_not_fit(
        self, bundle: Bundle, built: tuple[ModelSpec, Plans], shape: tuple[int, ...], dtype: str
    ) -> None:
        backend = backend_of(built)
        found = Memory(backend.spec, backend, bundle.hash_tables()).graphs["entropy"]
        good = {name: found.new(name, S=1) for name in found.tensors()}
        found.bind(**good)
        with pytest.raises(BackendError, match=r"graph 'entropy': '\w+' is int64 \['B', 'S'\], and a buffer of"):
            found.bind(**{**good, "positions": backend.buffer(dtype, shape)})
        with pytest.raises(BackendError, match="graph 'entropy' has no 'spam'"):
            found.bind(**good, spam=good["ids"])
        other = backend.buffer("float32", found.caches()["past_key.0"].shape, "device")
        with pytest.raises(BackendError, match=r"'present_key.0' must be bound to the buffer of 'past_key.0'"):
            backend.session("entropy").bind({**good, **found._caches, "present_key.0": other})

    def test_memory_of_the_device_has_no_view(self, built: tuple[ModelSpec, Plans]) -> None:
        buffer = backend_of(built).buffer("float32", (2, 3), "device")
        buffer.write(np.ones((1, 3), np.float32), (slice(1, 2),))
        assert buffer.read((slice(0, 2), slice(0, 1))).tolist() == [[0], [1]]
        with pytest.raises(BackendError, match="no view"):
            _ = buffer.array
        with pytest.raises(BackendError, match="no parts"):
            buffer.part(0, (1, 3))
