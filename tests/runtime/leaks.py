"""Memory, open files and threads of this process must not grow while streams are made and dropped."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from blt_runtime import Model, Stream
from blt_runtime.errors import Cancelled

SLACK = 4 << 20
"""Bytes by which the allocators may vary; 9,000 streams that leak 500 bytes each exceed it."""
ROUNDS = 3
"""A leak grows in each round; memory that the allocators keep (after thousands of other tests) grows once."""


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def use(model: Model, n: int) -> Stream:
    """A stream that has used a mix of features, which depends on n."""
    stream = model.stream(overflow="slide" if n % 5 == 0 else "error", seed=n)
    stream.append(b"a text, a text, a text"[: n % 20 + 1])
    for _ in stream.generate(2, speculate="lookup" if n % 3 == 0 else "off"):
        pass
    if n % 7 == 0:
        stream.rewind(3)
    if n % 11 == 0:
        model.stream(bos=False).restore(stream.snapshot())
    if n % 13 == 0:
        with suppress(Cancelled):
            stream.append(b"more of the text", cancelled=lambda: True)
    return stream


def assert_no_growth(once: Callable[[int], object], times: int) -> None:
    """After a tenth of the calls as a warm-up, the other calls leave memory, files and threads unchanged."""
    for n in range(times // 10):
        once(n)
    grown: list[int] = []
    while not grown or grown[-1] >= SLACK:
        memory, opened, threads = resident(), files(), threading.active_count()
        for n in range(times // 10, times):
            once(n)
        assert files() == opened
        assert threading.active_count() == threads
        grown.append(resident() - memory)
        assert len(grown) < ROUNDS or min(grown) < SLACK, f"bytes grown in each round: {grown}"


def assert_streams_leave_nothing(model: Model, streams: int) -> None:
    assert_no_growth(partial(use, model), streams)
