"""Batched graphs: the logits of single streams, and batch-invariant to the last bit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import httpx
import numpy as np
import pytest

from blt_export import pipeline
from blt_runtime import Model
from blt_runtime.backends.onnx import OnnxRowBackend, OnnxSession
from blt_runtime.backends.protocol import Buffer, Call, Place
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.engine.batch import Batch, gather
from blt_runtime.errors import BackendError, UsageError
from blt_runtime.ids import BOS, BYTES, OFFSET
from blt_runtime.scheduler import Scheduler
from tests import exports
from tests.runtime.device_backend import FarBuffer
from tests.runtime.engine.batches import read_texts
from tests.runtime.server.servers import answering, children, python
from tests.tiny import hard_text, runs_rows

pytestmark = pytest.mark.skipif(
    not runs_rows(), reason="needs onnxruntime 1.32: attention over rows of different lengths"
)

VARIANTS = ("plain", "cross_windows_own_heads_newlines", "no_hash_space_causal_latent", "max_patch_length",
            "hash_entropy_without_layers")  # fmt: skip


CASES = [*((v, "ort", "fp32") for v in VARIANTS), ("plain", "ort", "int8"), (VARIANTS[1], "cuda", "fp32")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    variant, flavour, precision = request.param
    state = exports.prepare(variant, flavour, precision=precision, check=False)
    return pipeline.run(state, tmp_path_factory.mktemp("rows") / "bundle").path


def batch_of(path: Path, rows: int, share: float = 0.5) -> Batch:
    model = Model.open(path, batched=True)
    return Batch(model.spec, model.backend, model.hash_tables, rows=rows, slice=16, ready=gather(share))


def texts(n: int) -> dict[int, np.ndarray]:
    """Pieces of the hard text, which ends documents and lines everywhere; a long one; and one without any space, which
    the rule of spaces leaves in one patch."""
    ids = hard_text()
    chosen = {i: np.roll(ids, -37 * i)[: 100 + 13 * i] for i in range(n)}
    return chosen | {n: np.tile(ids, 3)[:560], n + 1: np.array([BOS, *[OFFSET + 97] * 60, OFFSET + 32, *ids[3:30]])}


def test_rows_are_streams(bundle: Path) -> None:
    chosen, prompts = texts(2), {0: 1, 1: 60, 2: 517, 3: 40}
    seen = read_texts(batch_of(bundle, 4), chosen, prompts)
    model = Model.open(bundle)
    for i, ids in chosen.items():
        score = model.score(ids).logits[prompts[i] - 1 :]
        tolerance = 2e-5 if model.manifest and model.manifest.precision == "fp32" else 0.05 * np.abs(score).max()
        np.testing.assert_allclose(np.array(seen[i]), score, 0, tolerance)


def test_rows_are_batch_invariant_to_the_last_bit(bundle: Path) -> None:
    chosen = texts(3)
    prompts = {0: 1, 1: 60, 2: 17, 3: 520, 4: 5}
    alone = [read_texts(batch_of(bundle, 1), {i: ids}, prompts)[i] for i, ids in chosen.items()]
    for rows, share in ((5, 0.0), (8, 0.7)):
        together = read_texts(batch_of(bundle, rows, share), chosen, prompts)
        for i, logits in enumerate(alone):
            np.testing.assert_array_equal(np.array(together[i]), np.array(logits))


def test_a_prefix_is_held_while_other_rows_run(bundle: Path) -> None:
    batch, ids, other = batch_of(bundle, 3), hard_text()[:90], np.roll(hard_text(), -200)[:140]
    first = batch.open()
    assert first is not None
    first.feed(ids)
    while not first.done:
        batch.round()
    prefix = batch.snapshot(first)
    batch.close(first)
    restored, beside = batch.open(), batch.open()
    assert restored is not None
    assert beside is not None
    batch.restore(restored, prefix)
    np.testing.assert_array_equal(restored.logits_V, prefix.arrays["logits"])
    beside.feed(other)
    while not beside.done:  # the restored row is idle in all these calls
        batch.round()
    restored.feed(other[:20])
    while not restored.done:
        batch.round()
    alone = batch_of(bundle, 1)
    again = alone.open()
    assert again is not None
    for piece in (ids, other[:20]):
        again.feed(piece)
        while not again.done:
            alone.round()
    np.testing.assert_array_equal(restored.logits_V, again.logits_V)


def test_a_cached_prefix_changes_no_bit(bundle: Path) -> None:
    """The logprobs of a continuation, bit for bit: with nothing cached, and after the snapshots of other prompts."""
    ids = hard_text()[:300]
    others = [ids[:150], np.concatenate([ids[:150], ids[:9]]), np.concatenate([ids[:97], ids[:40]])]
    prompts = [*others, np.concatenate([ids[:97], ids[50:90]]), ids]
    model, seen = Model.open(bundle, batched=True), []
    for prefix_bytes in (0, 1 << 26):
        with Scheduler(model, streams=2, prefix_bytes=prefix_bytes) as scheduler:
            requests = []
            for prompt in prompts:
                requests.append(scheduler.submit_ids(prompt, 12, temperature=0, tokens=True, logprobs=5))
                seen.append([(token.id, token.logprob, token.top) for token in requests[-1].tokens()])
            assert sum(request.reused > 0 for request in requests) == (0 if not prefix_bytes else 3)
    assert seen[: len(prompts)] == seen[len(prompts) :]


class FarRows(OnnxRowBackend):
    """The batched graphs of a device: the host has no view of caches, byte states and patch vectors."""

    def buffer(self, dtype: str, shape: tuple[int, ...], place: Place = "host") -> Buffer:
        return FarBuffer(dtype, shape) if place == "device" else super().buffer(dtype, shape, place)

    def row_session(self, group: str) -> FarRowSession:  # type: ignore[override]
        return FarRowSession(super().row_session(group))


class FarRowSession:
    def __init__(self, session: OnnxSession) -> None:
        self._session, self.spec = session, session.spec

    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        return self._session.bind({n: b.far if isinstance(b, FarBuffer) else b for n, b in buffers.items()})


@pytest.mark.parametrize("bundle", [CASES[-1]], indirect=True, ids=["cuda"])
def test_rows_of_a_device_are_copied_by_reads_and_writes_only(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    backend = FarRows(opened)
    batch = Batch(backend.spec, backend, opened.hash_tables(), rows=3, slice=16)
    chosen, prompts = texts(0), {0: 60, 1: 40}
    seen = read_texts(batch, chosen, prompts)
    want = read_texts(batch_of(bundle, 3), chosen, prompts)
    for i in chosen:
        np.testing.assert_array_equal(np.array(seen[i]), np.array(want[i]))
    first, other = batch.open(), batch.open()
    assert first is not None
    assert other is not None
    first.feed(hard_text()[:70])
    while not first.done:
        batch.round()
    batch.restore(other, batch.snapshot(first))
    for row in (first, other):
        row.feed(hard_text()[70:90])
    while not (first.done and other.done):
        batch.round()
    np.testing.assert_array_equal(other.logits_V, first.logits_V)


@pytest.mark.parametrize("bundle", [CASES[-1]], indirect=True, ids=["cuda"])
def test_hash_tables_on_the_device_are_gathered_by_the_graph(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    chosen, prompts, seen = texts(1), {0: 1, 1: 60, 2: 40}, []
    for place in ("host", "device"):
        backend = OnnxRowBackend(opened, hash_tables=place)
        batch = Batch(backend.spec, backend, opened.hash_tables(), rows=3, slice=16)
        assert (batch._arena.tables is not None) == (place == "device")
        seen.append(read_texts(batch, chosen, prompts))
    for i in chosen:
        np.testing.assert_allclose(np.array(seen[1][i]), np.array(seen[0][i]), atol=2e-5)
    with Scheduler(Model.open(bundle, batched=True, hash_tables="device"), streams=2) as scheduler:
        made = scheduler.submit("abc", 20, temperature=0.0, stop_at_eos=False).result()
    with Scheduler(Model.open(bundle, batched=True), streams=2) as scheduler:
        assert scheduler.submit("abc", 20, temperature=0.0, stop_at_eos=False).result() == made


@pytest.mark.parametrize("bundle", [CASES[0]], indirect=True, ids=["ort"])
def test_hash_tables_on_the_device_need_a_graph_for_it(bundle: Path) -> None:
    with pytest.raises(UsageError, match="has no graph for hash tables on a device: export the flavour cuda"):
        Model.open(bundle, batched=True, hash_tables="device")
    with pytest.raises(UsageError, match="hash_tables"):
        Model.open(bundle, batched=True, hash_tables="spam")


@pytest.mark.parametrize("slice", [5, 12])
def test_streams_end_at_their_capacity(tmp_path: Path, slice: int) -> None:
    """Rows that are full and idle leave the others room."""
    state = exports.prepare("bytes_no_window", capacity=60, chunk=16, check=False)
    model = Model.open(pipeline.run(state, tmp_path / "bundle").path, batched=True)
    with Scheduler(model, streams=3, slice=slice) as scheduler:
        for n in (30, 30, 10):
            requests = [scheduler.submit_ids(hard_text()[:31], n, temperature=0, stop_at_eos=False) for _ in range(3)]
            assert {len(request.result()) >= 0 and request.finish for request in requests} == {"length"}


def test_heads_that_the_attention_does_not_support_have_no_batched_graphs(tmp_path: Path) -> None:
    state = exports.prepare("all_layers_gqa_projection", check=False)
    made = pipeline.run(state, tmp_path / "bundle")
    assert made.manifest.row_graphs == {}
    with pytest.raises(BackendError, match="no batched graphs"):
        Model.open(made.path, batched=True)
    seen = Scheduler(Model.open(made.path), streams=2)  # stream by stream, on the graphs of single streams
    with seen:
        text = seen.submit_ids(hard_text()[:40], 20, temperature=0, stop_at_eos=False)
        stream = Model.open(made.path).stream(bos=False)
        stream.append_ids(hard_text()[:40])
        assert text.result() == b"".join(BYTES[id] for id in stream.generate_ids(20, temperature=0, stop_at_eos=False))


@pytest.mark.parametrize("bundle", [CASES[0]], indirect=True, ids=["plain"])
def test_workers_share_a_bundle_and_answer_as_a_scheduler_does(bundle: Path) -> None:
    with Scheduler(Model.open(bundle, threads=1, batched=True), streams=1) as scheduler:
        expected = scheduler.submit("abc", 20, seed=1, temperature=0.7, stop_at_eos=False).result()
    options = ("--workers", "2", "--threads", "1", "--port", "0")
    with python("-m", "blt.cli", "serve", str(bundle), *options) as process:
        assert process.stderr is not None
        url = re.findall("http://[^ ]+", process.stderr.readline())[0]
        for worker in children(process.pid):
            with answering(worker, process.pid):
                body = {"prompt": "abc", "max_tokens": 20, "seed": 1, "temperature": 0.7, "ignore_eos": True}
                answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
                assert answer["choices"][0]["text"] == expected.decode(errors="replace")
        process.terminate()
        assert process.wait(60) == 143
