"""Faults in the middle of a call: cancellation, interrupts, failing backends, several threads, no memory."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from blt_runtime import Model, PatchRule, Stream
from blt_runtime.backends.null import NullBackend, NullSession, null_spec
from blt_runtime.backends.protocol import Array, Buffer, Call, HostBuffer, Place
from blt_runtime.bundle.spec import GRAPHS, ModelSpec
from blt_runtime.errors import BackendError, BltError, BundleError, Cancelled, CapacityError, OutOfMemory, UsageError
from blt_runtime.sampling import Sampler
from tests.runtime.bundles import edit, write_bundle
from tests.runtime.streams import HASH, SPECS, assert_matches_reference, model_of, random_ids, tables_for

specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


class Trap:
    """Runs `action` in place of the n-th call of a graph."""

    def __init__(self, graph: str, n: int, action: Callable[[], None]) -> None:
        self.graph, self.left, self.action = graph, n, action

    def passed(self, graph: str) -> None:
        if graph == self.graph:
            self.left -= 1
            if self.left == 0:
                self.action()


class TrappedBackend(NullBackend):
    trap: Trap | None = None

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._sessions = {name: TrappedSession(self, graph) for name, graph in spec.graphs.items()}


class TrappedSession(NullSession):
    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        call, backend, name = super().bind(buffers), self._backend, self.spec.name
        assert isinstance(backend, TrappedBackend)

        def trapped() -> None:
            if backend.trap is not None:
                backend.trap.passed(name)
            call()

        return trapped


def trapped_model(spec: ModelSpec) -> Model:
    return Model(spec, TrappedBackend(spec), tables_for(spec))


def set_trap(model: Model, trap: Trap) -> None:
    assert isinstance(model.backend, TrappedBackend)
    model.backend.trap = trap


def one_by_one(stream: Stream, ids: Array) -> None:
    for id in ids:
        stream.append_ids([id])


def fail() -> None:
    raise BackendError("device lost")


def count_cancel_checks(spec: ModelSpec, first: Array, more: Array) -> int:
    checks = 0

    def counted() -> bool:
        nonlocal checks
        checks += 1
        return False

    stream = model_of(spec).stream()
    stream.append_ids(first)
    stream.append_ids(more, cancelled=counted)
    return checks


@specs
@pytest.mark.parametrize("length", [0, 3, 70])
def test_a_cancelled_append_changes_nothing(spec: ModelSpec, length: int) -> None:
    first, more = random_ids(length + 1, seed=length)[1:], random_ids(90, seed=8)
    for n in range(count_cancel_checks(spec, first, more)):
        model = model_of(spec)
        stream = model.stream()
        stream.append_ids(first)
        answers = iter([False] * n + [True])
        with pytest.raises(Cancelled, match="as it was"):
            stream.append_ids(more, cancelled=answers.__next__)
        plain = np.concatenate([[1], first])
        assert_matches_reference(stream, plain)
        stream.append_ids(more[:20])
        stream.append_ids(more[20:], cancelled=lambda: False)
        assert_matches_reference(stream, np.concatenate([plain, more]))


def test_cancelled_after_more_patches_than_are_remembered() -> None:
    """Linear caches would allow a rollback, but the patch vectors that the decoder reads are overwritten by then."""
    rule = PatchRule("static", patch_size=2)
    stream = model_of(null_spec(rule, local_kind="linear", slack=600, chunk=8)).stream()
    first = random_ids(29, seed=1)  # the last byte reads the last complete patch
    stream.append_ids(first)
    with pytest.raises(Cancelled):
        stream.append_ids(random_ids(300), cancelled=lambda: stream.position > 250)
    assert_matches_reference(stream, np.concatenate([[1], first]))


def test_cancellation_is_checked_between_chunks() -> None:
    spec = null_spec(chunk=8)
    assert count_cancel_checks(spec, random_ids(0), random_ids(95)) == 2 * 12  # entropies, then the rest


def test_another_thread_cancels() -> None:
    model = trapped_model(null_spec())
    stream, stop, reading = model.stream(), threading.Event(), threading.Event()
    stream.append("before")
    before = stream.ids
    set_trap(model, Trap("encoder", 3, reading.set))

    def stop_while_reading() -> None:
        reading.wait(60)
        stop.set()

    thread = threading.Thread(target=stop_while_reading)
    thread.start()
    with pytest.raises(Cancelled):
        stream.append(b"x" * 300, cancelled=lambda: reading.is_set() and stop.wait(60))
    thread.join()
    assert_matches_reference(stream, before)
    stream.append("after")
    assert len(list(stream.generate_ids(5, temperature=0, stop_at_eos=False))) == 5


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("way", ["step", "chunk", "draft", "rewind", "score"])
def test_ctrl_c_damages_the_stream_until_it_is_reset(graph: str, way: str, request: pytest.FixtureRequest) -> None:
    model = trapped_model(null_spec(hash=HASH))
    stream, other = model.stream(), model.stream()
    stream.append("some text before" * 9)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    set_trap(model, Trap(graph, 1 if way == "rewind" else 2, lambda: signal.raise_signal(signal.SIGINT)))
    ways: dict[str, Callable[[], object]] = {
        "step": lambda: one_by_one(stream, random_ids(40)),
        "chunk": lambda: stream.append(b"a long text" * 9),
        "draft": lambda: list(stream.generate_ids(60, temperature=0, stop_at_eos=False, speculate="lookup")),
        "rewind": lambda: stream.rewind(60),
        "score": lambda: stream.score_ids(random_ids(60)),
    }
    with pytest.raises(KeyboardInterrupt):
        ways[way]()
    for call in (
        lambda: stream.append("x"),
        lambda: stream.rewind(0),
        lambda: list(stream.generate_ids(1, temperature=0, stop_at_eos=False)),
    ):
        with pytest.raises(UsageError, match=r"failed half-way: call reset\(\)|the stream is empty"):
            call()
    other.append("untouched")
    assert_matches_reference(other, other.ids)
    stream.reset()
    stream.append("untouched")
    assert_matches_reference(stream, other.ids)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_thread_that_dies_damages_only_its_stream(graph: str, n: int) -> None:
    model = trapped_model(null_spec(hash=HASH))
    stream, other = model.stream(), model.stream()
    set_trap(model, Trap(graph, n, fail))
    deaths: list[BaseException] = []

    def work() -> None:
        try:
            for _ in stream.generate_ids(100, temperature=0, stop_at_eos=False):
                pass
        except BltError as error:
            deaths.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert str(deaths[0]) == "device lost"
    with pytest.raises(UsageError, match="half-way"):
        stream.append("x")
    assert list(other.generate_ids(50, temperature=0, stop_at_eos=False)) == list(
        model.stream().generate_ids(50, temperature=0, stop_at_eos=False)
    )
    assert_matches_reference(other, other.ids)
    snapshot = other.snapshot()
    stream.restore(snapshot)  # repairs as reset does
    assert_matches_reference(stream, other.ids)


def test_threads_that_share_one_stream() -> None:
    """The second thread gets an error; the bytes of successful calls are in order."""
    stream, refused, taken, start = model_of(null_spec(capacity_bytes=4096)).stream(), [], [], threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(300):
            try:
                stream.append(b"x")
                taken.append(1)
            except UsageError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(refused) <= {"another thread is using this stream: give each thread its own"}
    assert stream.position == 1 + len(taken) <= 256 or not refused or stream.position == 1 + len(taken)
    assert_matches_reference(stream, stream.ids)


@pytest.mark.parametrize("call", ["append", "rewind", "reset", "snapshot", "generate", "score"])
def test_a_second_thread_is_refused_by_every_call(call: str) -> None:
    model = trapped_model(null_spec())
    stream = model.stream()
    inside, leave = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        leave.wait(60)

    set_trap(model, Trap("decoder", 2, wait))
    thread = threading.Thread(target=lambda: stream.append(b"a text" * 20))
    thread.start()
    assert inside.wait(60)
    calls: dict[str, Callable[[], object]] = {
        "append": lambda: stream.append("x"),
        "rewind": lambda: stream.rewind(1),
        "reset": stream.reset,
        "snapshot": stream.snapshot,
        "generate": lambda: next(stream.generate(1)),
        "score": lambda: stream.score_ids([1, 2]),
    }
    try:
        with pytest.raises(UsageError, match="another thread"):
            calls[call]()
    finally:
        leave.set()
        thread.join()
    assert_matches_reference(stream, stream.ids)
    assert stream.position == 121


@pytest.mark.parametrize("limit", ["capacity_bytes", "capacity_patches"])
@pytest.mark.parametrize("size", [1 << 50, 1 << 62, 1 << 80])
def test_an_absurd_capacity(limit: str, size: int) -> None:
    spec = null_spec()
    latent = spec.graphs["latent"]
    cache = latent.cache
    assert cache is not None
    if limit == "capacity_bytes":
        spec = replace(spec, capacity_bytes=size)
    else:
        caches = {t.name for t in (*latent.inputs, *latent.outputs)} & {*latent.aliases, *latent.aliases.values()}
        grow = lambda ts: tuple(replace(t, shape=(*t.shape[:2], size, 1)) if t.name in caches else t for t in ts)  # noqa: E731
        latent = replace(
            latent, inputs=grow(latent.inputs), outputs=grow(latent.outputs), cache=replace(cache, capacity=size)
        )
        spec = replace(spec, capacity_patches=size, graphs={**spec.graphs, "latent": latent})
    with pytest.raises(OutOfMemory, match=f"{size:,} .* smaller --capacity") as error:
        model_of(spec).stream()
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1


class Scarce(NullBackend):
    """Provides a limited number of buffers."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.left = 1 << 30

    def buffer(self, dtype: str, shape: tuple[int, ...], place: Place = "host") -> HostBuffer:
        self.left -= 1
        if self.left < 0:
            raise MemoryError(f"no room for {shape}")
        return super().buffer(dtype, shape)


def test_no_memory_at_any_place_of_making_a_stream() -> None:
    spec = null_spec()
    backend = Scarce(spec)
    model = Model(spec, backend)
    model.stream()
    needed = (1 << 30) - backend.left
    assert needed > 10
    for n in range(needed):
        backend.left = n
        with pytest.raises(OutOfMemory, match=r"no room for .* takes up to 2[\d,]+ bytes"):
            model.stream()
    backend.left = needed
    assert_matches_reference(model.stream(), np.array([1]))


def test_no_memory_in_a_call() -> None:
    spec = null_spec()
    backend = Scarce(spec)
    model = Model(spec, backend)
    stream, other = model.stream(), model.stream()
    other.append("untouched")
    backend.left = 1
    with pytest.raises(OutOfMemory, match="fewer streams"):
        stream.append(b"a long text")
    with pytest.raises(UsageError, match="half-way"):
        stream.append("x")
    with pytest.raises(OutOfMemory):
        other.generate_ids(5, temperature=0, stop_at_eos=False, speculate="lookup")
    assert_matches_reference(other, other.ids)  # no call had started
    backend.left = 1 << 30
    stream.reset()
    for each in (stream, other):
        each.append("x")
        assert_matches_reference(each, each.ids)


def test_no_memory_for_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = model_of(null_spec()).stream()

    def none(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr("blt_runtime.stream.take", none)
        with pytest.raises(OutOfMemory, match="no room"):
            stream.snapshot()
    stream.append("x")  # it was only read
    assert_matches_reference(stream, stream.ids)


def test_a_sampler_that_fails_is_as_bad_as_a_backend() -> None:
    class Broken(Sampler):
        def __call__(self, logits_V: np.ndarray) -> int:
            raise ZeroDivisionError

    stream = model_of(null_spec()).stream()
    with pytest.raises(ZeroDivisionError):
        next(stream.generate_ids(1, sampler=Broken(0.0), stop_at_eos=False))
    with pytest.raises(UsageError, match="half-way"):
        stream.append("x")


def test_a_full_stream_is_not_damaged_by_cancelling_or_asking() -> None:
    stream = model_of(null_spec(capacity_bytes=40)).stream()
    with pytest.raises(CapacityError):
        stream.append(b"x" * 40, cancelled=lambda: True)
    stream.append(b"x" * 39, cancelled=lambda: False)
    assert_matches_reference(stream, stream.ids)


def test_the_requested_precision(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    assert isinstance(Model.open(tmp_path / "b", "null", precision="fp32").stream(), Stream)
    with pytest.raises(BundleError, match=r"b was exported at fp32, not int8: blt export .* --precision int8"):
        Model.open(tmp_path / "b", "null", precision="int8")
    edit(tmp_path / "b", precision="int8", precisions={"entropy": "fp32"})
    Model.open(tmp_path / "b", "null", precision="int8")
    with pytest.raises(BundleError, match="was exported at int8, not fp32"):
        Model.open(tmp_path / "b", "null", precision="fp32")


@pytest.mark.parametrize("error", [MemoryError("no 5 bytes"), RuntimeError("can't start new thread")])
def test_no_memory_to_open_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    write_bundle(tmp_path / "b")

    def none(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("blt_runtime.model._backend", none)
    with pytest.raises(OutOfMemory, match=f"not enough memory to open .*b \\({error}\\): export at fewer bits"):
        Model.open(tmp_path / "b")
