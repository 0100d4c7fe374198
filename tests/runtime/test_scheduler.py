"""Requests on the null backend, under real threads."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping

import numpy as np
import pytest

from blt_runtime import Model, PatchRule, Request, Scheduler
from blt_runtime.backends.null import NullBackend, NullSession, null_spec
from blt_runtime.backends.protocol import Buffer, Call
from blt_runtime.errors import BackendError, BltError, Cancelled, CapacityError, QueueFull, UsageError
from blt_runtime.ids import encode
from blt_runtime.requests import Work
from blt_runtime.sampling import Sampler
from blt_runtime.text import StopMatcher
from tests.runtime.streams import model_of

SPEC = null_spec(local_kind="window", capacity_bytes=300, capacity_patches=300)


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    with Scheduler(model_of(SPEC), streams=3, slice=4) as made:
        yield made


def alone(prompt: str, n: int, seed: int) -> bytes:
    stream = model_of(SPEC).stream(seed=seed)
    stream.append(prompt)
    return b"".join(stream.generate(n, stop_at_eos=False))


def test_requests_generate_what_streams_generate(scheduler: Scheduler) -> None:
    asked = [(f"prompt {i} " * (1 + i), 20 + i, i) for i in range(10)]
    requests = [scheduler.submit(p, n, seed=seed, stop_at_eos=False) for p, n, seed in asked]
    for request, (prompt, n, seed) in zip(requests, asked, strict=True):
        assert request.result() == alone(prompt, n, seed)
        assert (request.finish, request.generated) == ("length", n)
    assert scheduler.load == (0, 0)


def test_a_prefix_is_read_once(scheduler: Scheduler) -> None:
    prefix = scheduler.read("system prompt, read once. ")
    before = scheduler.counts.tokens
    requests = [scheduler.submit(f"question {i}", 20, seed=i, stop_at_eos=False, after=prefix) for i in range(5)]
    for i, request in enumerate(requests):
        assert request.result() == alone(f"system prompt, read once. question {i}", 20, i)
    assert scheduler.counts.tokens - before == 5 * (len("question 0") + 19)
    with Scheduler(model_of(SPEC), streams=1) as other, pytest.raises(UsageError, match="taken from another scheduler"):
        other.submit("question", 5, after=prefix)
    with pytest.raises(CapacityError):
        scheduler.submit("x" * 200, 100, after=prefix)


def test_callers_in_several_threads(scheduler: Scheduler) -> None:
    got: dict[int, bytes] = {}

    def call(i: int) -> None:
        got[i] = scheduler.submit(f"text {i}", 15, seed=i, stop_at_eos=False).result()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == {i: alone(f"text {i}", 15, i) for i in range(12)}


def test_a_stop_string_ends_a_request(scheduler: Scheduler) -> None:
    whole = scheduler.submit("abc", 60, seed=1, stop_at_eos=False).result()
    stop = whole[20:22]
    request = scheduler.submit("abc", 60, seed=1, stop=stop, stop_at_eos=False)
    assert request.result() == whole[: whole.index(stop)]
    assert request.finish == "stop"


def test_cancelled_while_it_generates_and_while_it_reads(scheduler: Scheduler) -> None:
    writing = scheduler.submit("a", 280, seed=0, stop_at_eos=False)
    pieces = iter(writing)
    first = next(pieces)
    writing.cancel()
    with pytest.raises(Cancelled):
        list(pieces)
    assert first
    assert writing.finish == "cancelled"
    assert writing.generated < 280
    reading = [scheduler.submit("b" * 250, 2, seed=0) for _ in range(6)]  # some of them wait for a row
    for request in reading:
        request.cancel()
    for request in reading:
        with pytest.raises(Cancelled):
            request.result()
    assert scheduler.submit("abc", 5, seed=3, stop_at_eos=False).result() == alone("abc", 5, 3)


class Held(Sampler):
    """Greedy; each of its choices waits until it is let go."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.choices, self.reached, self._go = 0, threading.Event(), threading.Event()

    def __call__(self, logits_V: np.ndarray) -> int:
        self.choices += 1
        self.reached.set()
        assert self._go.wait(60)
        return super().__call__(logits_V)

    def let_go(self) -> None:
        self._go.set()


def close(pieces: Iterator[bytes]) -> None:
    assert isinstance(pieces, Generator)
    pieces.close()


def dropped(scheduler: Scheduler, request: Request, how: str) -> Work:
    """Stops reading the request in one of the ways after which the rest of its bytes cannot be read."""
    work = request._work
    if how == "closed":
        pieces = request.__iter__()
        work.out.put(b"a piece")
        next(pieces)
        close(pieces)
    elif how == "left":
        work.out.put(b"a piece")
        for _ in request:
            break
    elif how == "cycle":
        vars(request)["itself"] = request
    return work


@pytest.mark.parametrize("how", ["dropped", "closed", "left", "cycle"])
def test_an_abandoned_request_is_cancelled_and_its_row_is_free(how: str) -> None:
    with Scheduler(model_of(SPEC), streams=1, slice=4) as scheduler:
        held = Held()
        request = scheduler.submit_ids(encode("a"), 280, sampler=held, stop_at_eos=False)
        assert held.reached.wait(60)  # it has the only row
        work = dropped(scheduler, request, how)
        if how in ("dropped", "cycle"):
            del request
        gc.collect()
        held.let_go()
        assert scheduler.submit("abc", 5, seed=3, stop_at_eos=False).result() == alone("abc", 5, 3)
        assert (work.finish, held.choices, scheduler.load) == ("cancelled", 1, (0, 0))


def test_an_abandoned_request_that_waits_never_runs() -> None:
    with Scheduler(model_of(SPEC), streams=1, slice=4) as scheduler:
        held, never = Held(), Held()
        running = scheduler.submit_ids(encode("a"), 5, sampler=held, stop_at_eos=False)
        assert held.reached.wait(60)
        work = scheduler.submit_ids(encode("b"), 5, sampler=never, stop_at_eos=False)._work
        held.let_go()
        running.result()
        assert scheduler.submit("abc", 5, seed=3, stop_at_eos=False).result() == alone("abc", 5, 3)
        assert (work.finish, work.generated, never.choices) == ("cancelled", 0, 0)


def test_an_iterator_or_a_waiting_caller_keeps_its_request(scheduler: Scheduler) -> None:
    pieces = iter(scheduler.submit("abc", 60, seed=1, stop_at_eos=False))
    gc.collect()
    assert b"".join(pieces) == alone("abc", 60, 1)
    unread = scheduler.submit("abc", 60, seed=1, stop_at_eos=False)
    unread.__iter__()  # never begun, so nothing is lost
    gc.collect()
    assert unread.result() == alone("abc", 60, 1)
    assert (unread.finish, unread.generated) == ("length", 60)
    assert list(unread) == []


def test_an_iterator_that_is_closed_at_the_end_cancels_nothing(scheduler: Scheduler) -> None:
    request = scheduler.submit("abc", 9, seed=1, stop_at_eos=False)
    pieces = request.__iter__()
    whole = b"".join(pieces)
    close(pieces)
    assert (whole, request.finish) == (alone("abc", 9, 1), "length")


def test_wrong_requests_change_nothing(scheduler: Scheduler) -> None:
    with pytest.raises(CapacityError, match="exceed the 300"):
        scheduler.submit("x" * 200, 101)
    with pytest.raises(UsageError, match="at least 1"):
        scheduler.submit("x", 0)
    with pytest.raises(UsageError, match="temperature"):
        scheduler.submit("x", 1, temperature=-1)
    assert scheduler.load == (0, 0)


def test_a_full_queue_is_refused() -> None:
    gate = threading.Event()
    with Scheduler(Model(SPEC, Gated(gate)), streams=1, waiting=2) as scheduler:
        requests = [scheduler.submit("a", 3, stop_at_eos=False)]
        wait_for(lambda: scheduler.load == (1, 0))
        requests += [scheduler.submit("b", 3, stop_at_eos=False) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 requests"):
            scheduler.submit("c", 3)
        gate.set()
        assert all(len(request.result()) <= 3 and request.finish == "length" for request in requests)


def test_a_failing_backend_fails_its_requests_and_no_others() -> None:
    backend = Failing(at=40)
    with Scheduler(Model(SPEC, backend), streams=2, slice=4) as scheduler:
        broken = [scheduler.submit("abc", 200, seed=i, stop_at_eos=False) for i in range(2)]
        for request in broken:
            with pytest.raises(BackendError, match="the 40th call"):
                request.result()
            assert request.finish == "error"
        later = scheduler.submit("abc", 9, seed=4, stop_at_eos=False)
        assert later.result() == alone("abc", 9, 4)


@pytest.mark.parametrize("fault", ["sampler", "matcher", "flush"])
def test_a_callers_sampler_or_matcher_fails_only_its_own_request(
    scheduler: Scheduler, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(Sampler):
        def __call__(self, logits_V: object) -> int:
            raise ValueError("wrong")

    class Matcher(StopMatcher):
        def feed(self, data: bytes) -> bytes:
            return super().feed(data) if fault == "flush" else self.flush()

        def flush(self) -> bytes:
            raise ValueError("wrong")

    beside = [scheduler.submit("abc", 30, seed=i, stop_at_eos=False) for i in range(2)]
    if fault != "sampler":
        monkeypatch.setattr("blt_runtime.requests.StopMatcher", Matcher)
    sampler = Wrong(0.0) if fault == "sampler" else Sampler(0.0)
    broken = scheduler.submit_ids(encode("abc"), 5, sampler=sampler, stop="\0", stop_at_eos=False)
    monkeypatch.undo()
    with pytest.raises(BltError, match="unexpected error: ValueError"):
        broken.result()
    assert [request.result() for request in beside] == [alone("abc", 30, i) for i in range(2)]
    assert scheduler.submit("abc", 9, seed=5, stop_at_eos=False).result() == alone("abc", 9, 5)


def test_a_request_that_needs_too_many_patches_fails_alone() -> None:
    spec = null_spec(rule=PatchRule("byte"), capacity_bytes=300, capacity_patches=40)
    with Scheduler(Model(spec, NullBackend(spec)), streams=2, slice=4) as scheduler:
        fits = scheduler.submit("ab", 37, stop_at_eos=False)
        with pytest.raises(CapacityError, match="40 patches"):
            scheduler.submit("ab", 90, stop_at_eos=False).result()
        assert len(fits.result()) <= 37
        assert fits.finish == "length"
        prefix = scheduler.read("x" * 39)  # and BOS: every patch is used
        with pytest.raises(CapacityError):
            scheduler.submit("y", 1, after=prefix).result()
        assert scheduler.load == (0, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_interrupted_thread_ends_all_requests() -> None:
    class Exit(Sampler):
        def __call__(self, logits_V: object) -> int:
            raise SystemExit

    scheduler = Scheduler(model_of(SPEC), streams=2)
    requests = [
        scheduler.submit("abc", 200, stop_at_eos=False),
        scheduler.submit_ids(encode("abc"), 5, sampler=Exit(0.0), stop_at_eos=False),
    ]
    for request in requests:
        with pytest.raises(Cancelled, match="closed"):
            request.result()
    with pytest.raises(UsageError, match="closed"):
        scheduler.submit("a", 1)
    scheduler.close()


def test_a_kept_prefix_does_not_keep_the_caches() -> None:
    scheduler = Scheduler(model_of(SPEC), streams=1)
    prefix, batch = scheduler.read("system"), weakref.ref(scheduler._batch)
    scheduler.close()
    del scheduler
    assert batch() is None
    assert prefix.position == 7


def test_closing_cancels_running_and_waiting_requests() -> None:
    scheduler = Scheduler(model_of(SPEC), streams=1)
    requests = [scheduler.submit("a" * 100, 190, stop_at_eos=False) for _ in range(3)]
    scheduler.close()
    for request in requests:
        with pytest.raises(Cancelled, match="closed"):
            request.result()
    with pytest.raises(UsageError, match="closed"):
        scheduler.submit("a", 1)


def test_an_error_is_raised_again_at_the_next_iteration(scheduler: Scheduler) -> None:
    request: Request = scheduler.submit("a", 250)
    request.cancel()
    for _ in range(2):
        with pytest.raises(Cancelled):
            request.result()


class Failing(NullBackend):
    """Raises at one of its calls, once."""

    def __init__(self, at: int) -> None:
        super().__init__(SPEC)
        self._left = at
        self._sessions = {name: FailingSession(self, graph) for name, graph in SPEC.graphs.items()}

    def count(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise BackendError("the 40th call failed")


class FailingSession(NullSession):
    def bind(self, buffers: Mapping[str, Buffer]) -> Call:
        call, backend = super().bind(buffers), self._backend
        assert isinstance(backend, Failing)

        def counted() -> None:
            backend.count()
            call()

        return counted


class Gated(NullBackend):
    """Waits for a gate before it returns a session."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__(SPEC)
        self._gate = gate

    def session(self, group: str) -> NullSession:
        self._gate.wait(60)
        return super().session(group)


def wait_for(true: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.001)
