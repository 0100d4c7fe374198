"""How fast a batch of streams generates, and what the prefill of a new request costs the others.

All requests run from the start. The speed is measured while all of them generate: from the last first byte to the
first last byte. Then all but one generate while one more prompt is read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blt.bench.runs import Forced, Text
from blt_runtime import Model, Request, Scheduler
from blt_runtime.engine.batch import Counts
from blt_runtime.errors import CapacityError, UsageError
from blt_runtime.ids import BOS

SHIFT = 3


class Stamped(Forced):
    """A forced sampler that notes when it was asked (seconds of `time.perf_counter`), and what was done until then."""

    def __init__(self, ids: Iterable[int], temperature: float, scheduler: Scheduler) -> None:
        super().__init__(ids, temperature)
        self.stamps: list[float] = []
        self.counts: list[Counts] = []
        self._scheduler = scheduler

    def __call__(self, logits_V: NDArray[Any]) -> int:
        self.stamps.append(time.perf_counter())
        self.counts.append(replace(self._scheduler.counts))
        return super().__call__(logits_V)


@dataclass(frozen=True)
class Together:
    """One run of `streams` requests: until each one's first byte, and then while all write: how long, the gaps between
    their bytes, and what the scheduler did. Seconds."""

    streams: int
    first_bytes_s: Sequence[float]
    seconds: float
    gaps_s: Sequence[float]
    done: Counts

    @property
    def bytes_per_s(self) -> float:
        """Of all streams."""
        return len(self.gaps_s) / self.seconds

    @property
    def first_byte_s(self) -> float:
        """Median."""
        return statistics.median(self.first_bytes_s)

    @property
    def patches_per_call(self) -> float:
        """Of the latent transformer."""
        return self.done.patches / max(1, self.done.latent_calls)

    @property
    def mean_patch(self) -> float:
        return self.done.tokens / max(1, self.done.patches)

    def gap_s(self, percent: float) -> float:
        """A percentile of the gaps between the bytes of one stream."""
        return float(np.percentile(self.gaps_s, percent))


@dataclass(frozen=True)
class Joined:
    """Gaps of streams that write, before and while another one's prompt is read; and how long that took. Seconds."""

    before_s: Sequence[float]
    while_s: Sequence[float]
    first_byte_s: float

    @property
    def p95_ratio(self) -> float:
        return float(np.percentile(self.while_s, 95) / np.percentile(self.before_s, 95))


def texts(data: bytes, streams: int, prompt_bytes: int, new_bytes: int) -> list[Text]:
    """A text for each stream: the same bytes, begun a few later each, so that patches end at different times, and are
    as long as in the first."""
    return [Text.of(data[SHIFT * i :], prompt_bytes, new_bytes) for i in range(streams)]


def together(model: Model, given: Sequence[Text], temperature: float, share: float, slice: int) -> Together:
    """Runs one request for each text. Raises CapacityError if one does not fit, UsageError if they never all write."""
    with _scheduler(model, given, share, slice) as scheduler:
        _run(scheduler, [replace(text, new=text.new[:8]) for text in given], temperature)  # bound calls, threads
        began = time.perf_counter()
        samplers = _run(scheduler, given, temperature)
    first = max(samplers, key=lambda s: s.stamps[0])
    last = min(samplers, key=lambda s: s.stamps[-1])
    start, end = first.stamps[0], last.stamps[-1]
    if start >= end:
        raise UsageError("the first stream was done before the last one wrote: measure with more --new-bytes")
    gaps = [gap for s in samplers for gap in _gaps(s.stamps, start, end)]
    before, after = vars(first.counts[0]), vars(last.counts[-1])
    done = Counts(**{name: after[name] - before[name] for name in before})
    return Together(len(given), [s.stamps[0] - began for s in samplers], end - start, gaps, done)


def joined(model: Model, given: Sequence[Text], temperature: float, share: float, slice: int) -> Joined:
    """All texts but the last write; when a quarter is written, the last one's prompt is read. Raises UsageError if they
    were too fast for that."""
    with _scheduler(model, given, share, slice) as scheduler:
        _run(scheduler, [replace(text, new=text.new[:8]) for text in given], temperature)
        writers = [Stamped(text.new.tolist(), temperature, scheduler) for text in given[:-1]]
        requests = [_submit(scheduler, text, w) for text, w in zip(given[:-1], writers, strict=True)]
        while min(len(w.stamps) for w in writers) < len(given[0].new) // 4 and not any(r.finish for r in requests):
            time.sleep(0.001)
        newcomer = Stamped(given[-1].new[:2].tolist(), temperature, scheduler)
        joins = time.perf_counter()
        _submit(scheduler, replace(given[-1], new=given[-1].new[:2]), newcomer).result()
        for request in requests:
            request.result()
    first = max(w.stamps[0] for w in writers)
    over = min(newcomer.stamps[0], *(w.stamps[-1] for w in writers))
    found = Joined(
        [gap for w in writers for gap in _gaps(w.stamps, first, joins)],
        [gap for w in writers for gap in _gaps(w.stamps, joins, over)],
        newcomer.stamps[0] - joins,
    )
    if not found.before_s or not found.while_s:
        raise UsageError("the streams were done before one more prompt was read: measure with more --new-bytes")
    return found


def _gaps(stamps: Sequence[float], start: float, end: float) -> list[float]:
    """Gaps that end between two times."""
    return [b - a for a, b in pairwise(stamps) if start < b <= end]


def _scheduler(model: Model, given: Sequence[Text], share: float, slice: int) -> Scheduler:
    longest = max(1 + len(text.prompt) + len(text.new) for text in given)
    if longest > model.spec.capacity_bytes:
        raise CapacityError(
            f"a run takes {longest:,} tokens, but a stream holds {model.spec.capacity_bytes:,}: give fewer bytes, or "
            "export with a larger --capacity"
        )
    return Scheduler(model, streams=len(given), capacity=longest, share=share, slice=slice)


def _run(scheduler: Scheduler, given: Sequence[Text], temperature: float) -> list[Stamped]:
    """One request for each text, all done."""
    samplers = [Stamped(text.new.tolist(), temperature, scheduler) for text in given]
    requests = [_submit(scheduler, text, sampler) for text, sampler in zip(given, samplers, strict=True)]
    for request in requests:
        request.result()
    return samplers


def _submit(scheduler: Scheduler, text: Text, sampler: Stamped) -> Request:
    return scheduler.submit_ids(np.concatenate([[BOS], text.prompt]), len(text.new), sampler=sampler, stop_at_eos=False)
