"""Padded graphs, which TensorRT's engines run for batched streams: the logits of single streams."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from blt_export import bundle as bundles
from blt_export import pipeline
from blt_export.build import build_graph, profiles
from blt_export.passes import keep_states
from blt_export.specs import export_spec
from blt_export.tensorrt import logger
from blt_runtime import Model
from blt_runtime.backends.onnx import OnnxSession, import_library
from blt_runtime.backends.protocol import Buffer, HostBuffer, PaddedBackend, Place
from blt_runtime.backends.tensorrt import TensorRtRows
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.bundle.spec import PADDED, ModelSpec, padded_spec, resident_spec
from blt_runtime.engine.batch import Batch
from blt_runtime.engine.rows import padded_limits
from blt_runtime.errors import BackendError, CapacityError, UsageError
from blt_runtime.ids import BOS, BYTES, EOS, OFFSET
from blt_runtime.scheduler import Scheduler
from tests import exports, fake_tensorrt
from tests.host_device import HostDevice
from tests.runtime.engine.batches import read_texts
from tests.tiny import hard_text, tiny

VARIANT = "cross_windows_own_heads_newlines"
ROWS = 4


class PaddedOnnx:
    """Padded graphs on ONNX Runtime's CPU."""

    name, rows = "padded", ROWS

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        self.spec = resident_spec(bundle.manifest.spec, cached=True)
        run = import_library().InferenceSession
        self._sessions = {
            name: OnnxSession(run(str(path), providers=["CPUExecutionProvider"]), padded_spec(self.spec.graphs[name]))
            for name, path in write_padded(bundle, folder).items()
        }

    def padded_session(self, group: str) -> OnnxSession:
        return self._sessions[group]

    def session(self, group: str) -> OnnxSession:
        raise AssertionError("graphs of single streams are not used")

    def buffer(self, dtype: str, shape: tuple[int, ...], place: Place = "host") -> Buffer:
        return HostBuffer(dtype, shape)


def write_padded(bundle: Bundle, folder: Path) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    return {
        name: bundles.write_graph(
            keep_states.run(ir.load(bundle.graph_file(name)), padded_spec(graph)), folder, f"{name}.padded"
        )
        for name, graph in resident_spec(bundle.manifest.spec, cached=True).graphs.items()
    }


def plans_of(bundle: Bundle, rows: int = ROWS) -> dict[str, bytes]:
    trt, spec = fake_tensorrt.module(HostDevice()), resident_spec(bundle.manifest.spec, cached=True)
    log = logger(trt)
    return {
        name: build_graph(bundle, graph, trt, log, profiles(spec, name, rows), streams=rows).plan
        for name, graph in spec.graphs.items()
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_of(VARIANT, tmp_path_factory.mktemp("padded"))


def bundle_of(variant: str, folder: Path, **options: Any) -> Bundle:
    state = exports.prepare(variant, "portable", check=False, **options)
    return Bundle.open(pipeline.run(state, folder / "bundle").path)


@pytest.fixture(scope="module")
def backend(bundle: Bundle) -> PaddedOnnx:
    return PaddedOnnx(bundle, bundle.path.parent / "graphs")


def batch_of(backend: Any, bundle: Bundle, rows: int = ROWS) -> Batch:
    return Batch(backend.spec, backend, bundle.hash_tables(), rows)


def texts() -> dict[int, np.ndarray]:
    """Pieces of the hard text, which ends documents and lines everywhere; a long one, which passes the ends of rings;
    and one with a long run of one letter."""
    ids = hard_text()
    chosen = {i: np.roll(ids, -37 * i)[: 90 - 13 * i] for i in range(2)}
    return chosen | {2: np.tile(ids, 3)[:540], 3: np.array([BOS, *[OFFSET + 97] * 60, OFFSET + 32, *ids[3:20]])}


def assert_rows_are_streams(seen: dict[int, list[np.ndarray]], bundle: Bundle, prompts: dict[int, int]) -> None:
    model = Model.open(bundle.path)
    for i, ids in texts().items():
        np.testing.assert_allclose(np.array(seen[i]), model.score(ids).logits[prompts[i] - 1 :], 0, 2e-5)


def test_rows_are_streams(backend: PaddedOnnx, bundle: Bundle) -> None:
    """Prompts of all lengths; rows are idle in the calls of others, and used again."""
    batch = batch_of(backend, bundle)
    assert isinstance(backend, PaddedBackend)
    for prompts in ({0: 1, 1: 60, 2: 517, 3: 41}, {0: 80, 1: 5, 2: 533, 3: 62}):
        assert_rows_are_streams(read_texts(batch, texts(), prompts), bundle, prompts)


def read(batch: Batch, *rows: Any) -> None:
    while not all(row.done for row in rows):
        batch.round()
        assert all(row.error is None for row in rows)


@pytest.mark.parametrize("held", [1, 61, 127])
def test_a_prefix_is_held_while_other_rows_run(backend: PaddedOnnx, bundle: Bundle, held: int) -> None:
    """A restored row is idle while another one reads on past the end of its rings."""
    ids, other = hard_text()[:held], np.roll(hard_text(), -200)[:140]
    batch = batch_of(backend, bundle)
    first, beside = batch.open(), batch.open()
    assert first is not None
    assert beside is not None
    first.feed(ids)
    beside.feed(other[:3])
    read(batch, first, beside)
    prefix = batch.snapshot(first)
    batch.close(first)
    batch.close(beside)
    beside, restored = batch.open(), batch.open()
    assert beside is not None
    assert restored is not None
    batch.restore(restored, prefix)
    np.testing.assert_array_equal(restored.logits_V, prefix.arrays["logits"])
    beside.feed(other)
    read(batch, beside)
    stream = Model.open(bundle.path).stream(bos=False)
    stream.append_ids(ids)
    for piece in (other[:1], [EOS], other[1:40]):
        restored.feed(np.asarray(piece))
        read(batch, restored)
        stream.append_ids(piece)
        np.testing.assert_allclose(restored.logits_V, stream.logits, 0, 2e-5)


class TestEngines:
    @pytest.fixture(scope="class")
    @staticmethod
    def plans(bundle: Bundle) -> dict[str, bytes]:
        return plans_of(bundle)

    def backend_of(self, bundle: Bundle, plans: dict[str, bytes]) -> TensorRtRows:
        device = HostDevice()
        spec: ModelSpec = resident_spec(bundle.manifest.spec, cached=True)
        return TensorRtRows(spec, plans, fake_tensorrt.module(device), device)

    def test_rows_are_streams(self, bundle: Bundle, plans: dict[str, bytes]) -> None:
        prompts = {0: 70, 1: 60, 2: 535, 3: 70}
        seen = read_texts(batch_of(self.backend_of(bundle, plans), bundle), texts(), prompts)
        assert_rows_are_streams(seen, bundle, prompts)

    def test_a_scheduler_gives_the_text_of_single_streams(self, bundle: Bundle, plans: dict[str, bytes]) -> None:
        backend = self.backend_of(bundle, plans)
        model = Model(backend.spec, backend, bundle.hash_tables())
        stream = Model.open(bundle.path).stream(bos=False)
        prompt = hard_text()[:70]
        stream.append_ids(prompt)
        want = b"".join(BYTES[id] for id in stream.generate_ids(12, temperature=0, stop_at_eos=False))
        with Scheduler(model, streams=3, prefix_bytes=1 << 24) as scheduler:
            for _ in range(2):
                requests = [scheduler.submit_ids(prompt, 12, temperature=0, stop_at_eos=False) for _ in range(2)]
                assert {request.result() for request in requests} == {want}
            assert requests[0].reused

    def test_more_streams_than_the_engines_run(self, bundle: Bundle, plans: dict[str, bytes]) -> None:
        with pytest.raises(UsageError, match="up to 4 streams at a time, not 5"):
            batch_of(self.backend_of(bundle, plans), bundle, rows=5)

    def test_single_streams(self, bundle: Bundle, plans: dict[str, bytes]) -> None:
        backend = self.backend_of(bundle, plans)
        with pytest.raises(UsageError, match="use a Scheduler"):
            Model(backend.spec, backend, bundle.hash_tables()).stream()

    def test_engines_of_different_rows(self, bundle: Bundle, plans: dict[str, bytes]) -> None:
        other = plans_of(bundle, rows=2)
        with pytest.raises(BackendError, match=r"for \[2, 4\] streams at a time"):
            self.backend_of(bundle, {**plans, "latent": other["latent"]})


def test_streams_end_at_their_capacity(tmp_path: Path) -> None:
    """Rows that are full and idle: their padding stays in their own memory, after what they read."""
    bundle = bundle_of("bytes_no_window", tmp_path, capacity=60, chunk=16)
    backend = PaddedOnnx(bundle, tmp_path / "graphs")
    most = 60 - 2 * PADDED
    ids = np.roll(hard_text(), -50)[:most]
    with Scheduler(Model(backend.spec, backend, bundle.hash_tables()), streams=ROWS) as scheduler:
        request = scheduler.submit_ids(ids[:-1], 2, temperature=0, stop_at_eos=False)
        assert len(request.result()) > 0
        with pytest.raises(CapacityError, match=f"exceed the {most} of a stream"):
            scheduler.submit_ids(ids, 2)
    batch = batch_of(backend, bundle)
    full, late = batch.open(), batch.open()
    assert full is not None
    assert late is not None
    full.feed(ids)
    read(batch, full)
    kept = batch.snapshot(full)
    for start, end in ((0, 20), (20, 21), (21, most - 6), (most - 6, most)):
        late.feed(ids[start:end])
        read(batch, late)
    want = Model.open(bundle.path).stream(bos=False)
    want.append_ids(ids)
    for row in (full, late):
        np.testing.assert_allclose(row.logits_V, want.logits, 0, 2e-5)
    after = batch.snapshot(full).arrays
    for name in (name for name in kept.arrays if name != "latent.past_patches"):  # a ring, which padding writes
        np.testing.assert_array_equal(after[name], kept.arrays[name])


def test_sizes_without_room_for_padding() -> None:
    short, spec = (
        resident_spec(export_spec(tiny(VARIANT), "portable", capacity=n, patches=None, chunk=16), cached=True)
        for n in (16, 192)
    )
    with pytest.raises(BackendError, match="--capacity above 16"):
        padded_limits(short)
    encoder = spec.graphs["encoder"]
    assert encoder.cache is not None
    wide = replace(encoder, cache=replace(encoder.cache, window=encoder.cache.capacity - 14))
    with pytest.raises(BackendError, match=r"'encoder': .* --chunk 16"):
        padded_limits(replace(spec, graphs={**spec.graphs, "encoder": wide}))
