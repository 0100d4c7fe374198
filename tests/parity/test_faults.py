"""Threads, missing memory, sliding and 2,000 streams on ONNX Runtime, with a tiny exported bundle."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blt_export import pipeline
from blt_runtime import Model, Stream
from blt_runtime.errors import BundleError, Cancelled
from blt_runtime.sampling import Sampler
from tests import exports
from tests.runtime.leaks import assert_streams_leave_nothing, use
from tests.tiny import hard_text

pytestmark = pytest.mark.usefixtures("no_collector")
THREADS = 8


@pytest.fixture(scope="module", params=["ort", "portable"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a capacity of 128 bytes and patches."""
    folder = tmp_path_factory.mktemp("bundle") / "b"
    return pipeline.run(exports.prepare("plain", request.param, capacity=128), folder).path


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return Model.open(bundle, threads=1)


def is_half_way(stream: Stream) -> bool:
    return stream.position > 60


def write(model: Model, seed: int) -> tuple[list[int], np.ndarray]:
    stream = model.stream(overflow="slide")
    stream.append_ids(hard_text()[seed : seed + 70])
    return list(stream.generate_ids(90, sampler=Sampler(1.0, seed=seed), stop_at_eos=False)), stream.logits.copy()


def test_threads_share_one_model(model: Model) -> None:
    """Each generates what a single thread generates, to the last bit, while others fail and are dropped."""
    alone = [write(model, seed) for seed in range(THREADS)]
    together: dict[int, tuple[list[int], np.ndarray]] = {}
    start = threading.Barrier(THREADS)

    def work(seed: int) -> None:
        start.wait()
        for _ in range(3):
            broken = model.stream()
            with pytest.raises(Cancelled):
                broken.append_ids(hard_text()[:100], cancelled=partial(is_half_way, broken))
            together[seed] = write(model, seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, (ids, logits_V) in enumerate(alone):
        assert together[seed][0] == ids
        np.testing.assert_array_equal(together[seed][1], logits_V)


def test_a_stream_that_slid_equals_a_fresh_one(model: Model) -> None:
    rng = np.random.default_rng(0)
    stream, text_N = model.stream(overflow="slide"), np.concatenate([hard_text()] * 3)
    t = slid = 0
    while t < len(text_N):
        n, before = int(rng.choice([1, 1, 1, 5, 40, 200])), stream.forgotten
        stream.append_ids(text_N[t : t + n])
        t = min(t + n, len(text_N))
        slid += stream.forgotten > before
        fresh = model.stream()
        fresh.append_ids(text_N[stream.forgotten : t])
        assert stream.ids.tolist() == fresh.ids.tolist()
        np.testing.assert_allclose(stream.logits, fresh.logits, atol=2e-5)
    assert slid > 5
    assert stream.position + stream.forgotten == len(text_N) + 1


def test_a_cancelled_append_changes_nothing(model: Model) -> None:
    text_N = hard_text()
    for n in range(4):
        stream, plain = model.stream(), model.stream()
        stream.append_ids(text_N[:20])
        answers = iter([False] * n + [True])
        with pytest.raises(Cancelled):
            stream.append_ids(text_N[20:120], cancelled=answers.__next__)
        for part in (text_N[:20], text_N[20:40]):
            plain.append_ids(part)
        stream.append_ids(text_N[20:40])
        assert stream.ids.tolist() == plain.ids.tolist()
        assert stream.patch_lengths.tolist() == plain.patch_lengths.tolist()
        np.testing.assert_allclose(stream.logits, plain.logits, atol=2e-5)


SCARCE = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
from blt_runtime import Model
from blt_runtime.errors import OutOfMemory, UsageError


def main():
    model = Model.open(sys.argv[1], threads=1)
    stream, other = model.stream(), model.stream()
    other.append("untouched")
    expected, ids = other.logits.tobytes(), [5] * 1000
    size = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize")) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    made, seen = [], []
    try:
        while len(made) < 100_000:
            made.append(model.stream())
    except OutOfMemory as error:
        seen.append(str(error))
    try:
        stream.append_ids(ids)
    except OutOfMemory as error:
        seen.append(str(error))
        try:
            stream.append("x")
        except UsageError as error:
            seen.append(str(error))
    made.clear()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert other.logits.tobytes() == expected
    stream.reset()
    stream.append("untouched")
    assert stream.logits.tobytes() == expected
    print("\\n".join(seen))


with ThreadPoolExecutor(1) as pool:  # a thread's stack is mapped whole; the first one's grows, and dies where it cannot
    pool.submit(main).result()
"""


def test_no_memory_is_one_line_and_nothing_is_lost(tmp_path: Path) -> None:
    bundle = pipeline.run(exports.prepare("static", capacity=1024, chunk=512), tmp_path / "b").path
    done = subprocess.run([sys.executable, "-c", SCARCE, bundle], capture_output=True, text=True, check=True)
    streams, call, after = done.stdout.splitlines()
    for line in (streams, call):
        assert line.startswith("not enough memory (")
        assert "a stream of 1,024 bytes and 1,024 patches takes up to " in line
        assert line.endswith("bytes; export with a smaller --capacity, or keep fewer streams")
    assert "half-way" in after


@pytest.mark.parametrize("n", [1, 15, 77, 91])
def test_a_dropped_stream_is_gone_at_once(model: Model, n: int) -> None:
    stream = use(model, n)
    gone: list[weakref.ref[Any]] = [weakref.ref(stream), weakref.ref(stream._memory.pool.buffer.array)]
    gone += [weakref.ref(b.array) for graph in stream._memory.graphs.values() for b in graph.caches().values()]
    del stream
    assert [ref() for ref in gone] == [None] * len(gone)


def test_a_thousand_streams(model: Model) -> None:
    assert_streams_leave_nothing(model, 1000)


@pytest.mark.slow
def test_two_thousand_streams(model: Model) -> None:
    """Fewer than on the null backend (tests/runtime/test_leaks.py), which runs the same Python: ONNX Runtime
    would leak caches, kilobytes per stream."""
    assert_streams_leave_nothing(model, 2_000)


def test_a_dropped_model_is_gone_at_once(bundle: Path) -> None:
    model = Model.open(bundle, threads=1)
    model.stream()
    gone = weakref.ref(model.backend.session("latent"))
    del model
    assert gone() is None
    assert gc.isenabled() is False


def test_a_bundle_of_another_precision(bundle: Path) -> None:
    Model.open(bundle, precision="fp32")
    with pytest.raises(BundleError, match="was exported at fp32, not int4"):
        Model.open(bundle, precision="int4")
