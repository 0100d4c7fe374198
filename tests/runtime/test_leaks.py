"""A dropped stream is freed at once, with its buffers: no reference cycle, no growth."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from blt_runtime import Model, Scheduler, Stream
from blt_runtime.backends.null import null_spec
from blt_runtime.backends.protocol import Buffer, Place
from blt_runtime.errors import BackendError, Cancelled, CapacityError, OutOfMemory
from tests.runtime.leaks import assert_no_growth, assert_streams_leave_nothing, use
from tests.runtime.streams import HASH, model_of, random_ids

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc"),
    pytest.mark.usefixtures("no_collector"),
]


def endings(model: Model) -> dict[str, Callable[[], Stream]]:
    """Streams in every state that could keep them alive after they are dropped."""

    def begun() -> Stream:
        stream = model.stream()
        pieces = stream.generate(9, speculate="lookup")
        next(pieces)
        return stream

    def failed() -> Stream:
        stream = model.stream()

        def fail() -> None:
            raise BackendError("device lost")

        stream._calls.decoder = fail
        with suppress(BackendError):
            stream.append("x")
        return stream

    def full() -> Stream:
        stream = model.stream()
        with suppress(CapacityError):
            stream.append(b"x" * 5000)
        return stream

    def scored() -> Stream:
        stream = model.stream()
        stream.score_ids(random_ids(30))
        return stream

    made = {f"used {n}": (lambda n=n: use(model, n)) for n in (1, 15, 77, 91)}
    return {**made, "begun": begun, "failed": failed, "full": full, "scored": scored}


@pytest.mark.parametrize("ending", endings(model_of(null_spec())).keys())
def test_a_dropped_stream_is_freed_at_once(ending: str) -> None:
    stream = endings(model_of(null_spec(hash=HASH)))[ending]()
    gone: list[weakref.ref[Any]] = [
        weakref.ref(stream),
        weakref.ref(stream._memory),
        weakref.ref(stream._memory.pool.buffer.array),
    ]
    del stream
    assert [ref() for ref in gone] == [None, None, None]


def test_a_stream_that_could_not_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = model_of(null_spec()), list[weakref.ref[Any]]()
    buffer = model.backend.buffer

    def few(dtype: str, shape: tuple[int, ...], place: Place = "host") -> Buffer:
        if len(made) == 20:
            raise MemoryError("enough")
        given = buffer(dtype, shape, place)
        made.append(weakref.ref(given.array))
        return given

    monkeypatch.setattr(model.backend, "buffer", few)
    with pytest.raises(OutOfMemory) as error:
        model.stream()
    del error
    assert [ref() for ref in made] == [None] * 20


def test_a_thousand_streams() -> None:
    assert_streams_leave_nothing(model_of(null_spec(hash=HASH)), 1000)


@pytest.mark.slow
def test_ten_thousand_streams() -> None:
    assert_streams_leave_nothing(model_of(null_spec(hash=HASH)), 10_000)


def test_a_leak_is_found() -> None:
    kept: list[bytes] = []
    with pytest.raises(AssertionError, match="grown in each round"):
        assert_no_growth(lambda n: kept.append(bytes(9000)), 10_000)


ROWS = null_spec(local_kind="window", capacity_bytes=300, capacity_patches=300)


def submit_one(scheduler: Scheduler, n: int) -> None:
    """A request that completes, stops or is cancelled, depending on n."""
    request = scheduler.submit("a text, a text"[: n % 13 + 1], 3, seed=n, stop="\n" if n % 3 else None)
    if n % 7 == 0:
        request.cancel()
    with suppress(Cancelled):
        request.result()


def assert_requests_leave_nothing(requests: int) -> None:
    threads = threading.active_count()
    with Scheduler(model_of(ROWS), streams=4) as scheduler:
        assert_no_growth(partial(submit_one, scheduler), requests)
        gone: list[weakref.ref[Any]] = [weakref.ref(scheduler), weakref.ref(scheduler._batch)]
    del scheduler
    assert threading.active_count() == threads
    assert [ref() for ref in gone] == [None, None]


def test_a_thousand_requests() -> None:
    assert_requests_leave_nothing(1000)


@pytest.mark.slow
def test_ten_thousand_requests() -> None:
    assert_requests_leave_nothing(10_000)
