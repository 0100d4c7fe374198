"""On an NVIDIA GPU: `pytest -m gpu`. The flavour cuda in half precision computes what the CPU computes from the same
weights, to the precision. Elsewhere these tests are skipped.

BLT_GPU_BUNDLES names bundles of the flavour cuda in fp16, so that a machine without PyTorch can run them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from blt_runtime import Model, Scheduler
from blt_runtime.backends.onnx import DeviceSession, OnnxBackend, load_library
from blt_runtime.backends.providers import PROVIDERS, check_available
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.errors import BltError
from blt_runtime.ids import EOS, encode

pytestmark = pytest.mark.gpu
TOLERANCE = 5e-3
"""Relative root mean square of float16."""
IDS = np.concatenate([encode("Grüße\naus 東京 " * 5, bos=True), [EOS], encode("def f(x):\n  return " * 4, bos=False)])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    try:
        check_available(load_library("1.30"), PROVIDERS["cuda"])
    except BltError as error:
        pytest.skip(str(error))
    for path in os.environ.get("BLT_GPU_BUNDLES", "").split(os.pathsep):
        if path and (found := Bundle.open(Path(path))).manifest.precision == "fp16":
            return found
    pytest.importorskip("onnx")
    from blt_export import pipeline
    from tests.exports import prepare

    state = prepare("cross_windows_own_heads_newlines", "cuda", precision="fp16", check=False)
    return Bundle.open(pipeline.run(state, tmp_path_factory.mktemp("gpu") / "bundle").path)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(np.square(got - want).mean() / np.square(want).mean()))


@pytest.mark.parametrize("capture", [False, True], ids=["launched", "captured"])
def test_streams_equal_those_of_the_cpu(bundle: Bundle, capture: bool) -> None:
    """Prompts, steps, an end of a document, a rewind, a snapshot, a second stream."""
    backend = OnnxBackend(bundle, provider="cuda", capture=capture)
    model = Model(backend.spec, backend, bundle.hash_tables())
    want, stream, other = Model.open(bundle.path).stream(bos=False), model.stream(bos=False), model.stream(bos=False)
    lengths = [len(IDS) // 2, 1, 1, len(IDS) // 4]
    for start, end in zip(np.cumsum([0, *lengths]), np.cumsum([*lengths, len(IDS)]), strict=True):
        for some in (want, stream):
            some.append_ids(IDS[start:end])
        assert relative(stream.logits, want.logits) < TOLERANCE
    before = stream.logits.copy()
    kept = stream.snapshot()
    made = list(stream.generate_ids(32, temperature=0.0, stop_at_eos=False))
    stream.rewind(32)
    assert relative(stream.logits, before) < TOLERANCE
    other.restore(kept)
    assert list(other.generate_ids(32, temperature=0.0, stop_at_eos=False)) == made


def test_step_calls_are_captured_and_replay_well(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    backend = OnnxBackend(bundle, provider="cuda", capture=True)
    stream = Model(backend.spec, backend, bundle.hash_tables()).stream()
    list(stream.generate_ids(16, temperature=0.0, stop_at_eos=False))
    sessions = [backend.session(name) for name in backend.spec.graphs]
    assert all(session.captured for session in sessions if isinstance(session, DeviceSession))
    assert "replays wrongly" not in caplog.text


def test_batched_streams_equal_single_ones(bundle: Bundle) -> None:
    try:
        model = Model.open(bundle.path, provider="cuda", batched=True)
    except BltError as error:
        pytest.skip(str(error))  # onnxruntime-gpu before 1.32 has no rows of different lengths
    prompts = ["The first ", "class Second:\n", "東京"]
    with Scheduler(model, streams=3) as scheduler:
        requests = [scheduler.submit(prompt, 40, temperature=0.0, stop_at_eos=False) for prompt in prompts]
        made = [request.result() for request in requests]
    with Scheduler(model, streams=1) as scheduler:
        alone = [scheduler.submit(p, 40, temperature=0.0, stop_at_eos=False).result() for p in prompts]
    assert made == alone
