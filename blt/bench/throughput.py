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
"""Bytes between the starts of two streams' texts."""
WARM_UP = 8
"""Bytes that each stream generates before the measurement, so that calls are bound and threads exist."""


class Stamped(Forced):
    """A forced sampler that records at each call the time (seconds of `time.perf_counter`) and the counts so far."""

    def __init__(self, ids: Iterable[int], temperature: float, scheduler: Scheduler) -> None:
        super().__init__(ids, temperature)
        self.stamps: list[float] = []
        self.counts: list[Counts] = []
        self._scheduler = scheduler

    def __call__(self, logits_V: NDArray[Any]) -> int:
        self.stamps.append(time.perf_counter())
        self.counts.append(replace(self._scheduler.counts))
        return super().__call__(logits_V)


@dataclass(frozen=True, kw_only=True)
class BatchRun:
    """One run of `streams` requests. Times are in seconds.

    first_bytes_s: time to first byte of each request. The rest is measured while all streams generate. seconds: its
    duration. gaps_s: between two bytes of one stream. done: the scheduler's counts.
    """

    streams: int
    first_bytes_s: Sequence[float]
    seconds: float
    gaps_s: Sequence[float]
    done: Counts

    @property
    def bytes_per_s(self) -> float:
        """Of all streams in total."""
        return len(self.gaps_s) / self.seconds

    @property
    def first_byte_s(self) -> float:
        """Median time to first byte."""
        return statistics.median(self.first_bytes_s)

    @property
    def patches_per_call(self) -> float:
        """Patches per call of the latent transformer."""
        return self.done.patches / max(1, self.done.latent_calls)

    @property
    def mean_patch(self) -> float:
        return self.done.tokens / max(1, self.done.patches)

    def gap_s(self, percent: float) -> float:
        """A percentile of the gaps between the bytes of one stream."""
        return float(np.percentile(self.gaps_s, percent))


@dataclass(frozen=True, kw_only=True)
class PrefillGaps:
    """Gaps between bytes of the other streams before and during the prefill of one more request, in seconds.

    first_byte_s: time to first byte of that request.
    """

    before_s: Sequence[float]
    during_s: Sequence[float]
    first_byte_s: float

    @property
    def p95_ratio(self) -> float:
        """95th percentile of the gaps during the prefill, divided by that before it."""
        return float(np.percentile(self.during_s, 95) / np.percentile(self.before_s, 95))


def shifted_texts(data: bytes, *, streams: int, prompt_bytes: int, new_bytes: int) -> list[Text]:
    """A text for each stream: the same bytes, each starting SHIFT bytes later than the one before. So the streams'
    patches end at different times and have the same mean size."""
    return [Text.of(data[SHIFT * i :], prompt_bytes, new_bytes) for i in range(streams)]


def batch_run(model: Model, given: Sequence[Text], *, temperature: float, share: float, slice: int) -> BatchRun:
    """Runs one request for each text. `share` and `slice` are options of `Scheduler`.

    Raises CapacityError if a text does not fit, and UsageError if the streams never all generate at the same time.
    """
    with _scheduler(model, given, share=share, slice=slice) as scheduler:
        _warm_up(scheduler, given, temperature)
        began = time.perf_counter()
        samplers = _run(scheduler, given, temperature)
    first = max(samplers, key=lambda s: s.stamps[0])
    last = min(samplers, key=lambda s: s.stamps[-1])
    start, end = first.stamps[0], last.stamps[-1]
    if start >= end:
        raise UsageError(
            "the first stream finished before the last one generated a byte: measure with more --new-bytes"
        )
    gaps = [gap for s in samplers for gap in _gaps(s.stamps, start, end)]
    before, after = vars(first.counts[0]), vars(last.counts[-1])
    done = Counts(**{name: after[name] - before[name] for name in before})
    return BatchRun(
        streams=len(given),
        first_bytes_s=[s.stamps[0] - began for s in samplers],
        seconds=end - start,
        gaps_s=gaps,
        done=done,
    )


def prefill_gaps(model: Model, given: Sequence[Text], *, temperature: float, share: float, slice: int) -> PrefillGaps:
    """Generates all texts but the last. When a quarter of their bytes is generated, the last one's prompt is read.

    Raises CapacityError if a text does not fit, and UsageError if the streams finished before that prompt was read.
    """
    with _scheduler(model, given, share=share, slice=slice) as scheduler:
        _warm_up(scheduler, given, temperature)
        samplers = [Stamped(text.new.tolist(), temperature, scheduler) for text in given[:-1]]
        requests = [_submit(scheduler, text, w) for text, w in zip(given[:-1], samplers, strict=True)]
        while min(len(s.stamps) for s in samplers) < len(given[0].new) // 4 and not any(r.finish for r in requests):
            time.sleep(0.001)
        added = Stamped(given[-1].new[:2].tolist(), temperature, scheduler)
        submitted = time.perf_counter()
        _submit(scheduler, replace(given[-1], new=given[-1].new[:2]), added).result()
        for request in requests:
            request.result()
    first = max(s.stamps[0] for s in samplers)
    end = min(added.stamps[0], *(s.stamps[-1] for s in samplers))
    found = PrefillGaps(
        before_s=[gap for s in samplers for gap in _gaps(s.stamps, first, submitted)],
        during_s=[gap for s in samplers for gap in _gaps(s.stamps, submitted, end)],
        first_byte_s=added.stamps[0] - submitted,
    )
    if not found.before_s or not found.during_s:
        raise UsageError("the streams finished before one more prompt was read: measure with more --new-bytes")
    return found


def _gaps(stamps: Sequence[float], start: float, end: float) -> list[float]:
    """Gaps between consecutive stamps that end between two times."""
    return [b - a for a, b in pairwise(stamps) if start < b <= end]


def _scheduler(model: Model, given: Sequence[Text], *, share: float, slice: int) -> Scheduler:
    longest = max(1 + len(text.prompt) + len(text.new) for text in given)
    if longest > model.spec.capacity_bytes:
        raise CapacityError(
            f"a run needs {longest:,} tokens, but a stream holds {model.spec.capacity_bytes:,}: give fewer bytes, or "
            "export with a larger --capacity"
        )
    return Scheduler(model, streams=len(given), capacity=longest, share=share, slice=slice)


def _warm_up(scheduler: Scheduler, given: Sequence[Text], temperature: float) -> None:
    _run(scheduler, [replace(text, new=text.new[:WARM_UP]) for text in given], temperature)


def _run(scheduler: Scheduler, given: Sequence[Text], temperature: float) -> list[Stamped]:
    """Runs one request for each text to its end."""
    samplers = [Stamped(text.new.tolist(), temperature, scheduler) for text in given]
    requests = [_submit(scheduler, text, sampler) for text, sampler in zip(given, samplers, strict=True)]
    for request in requests:
        request.result()
    return samplers


def _submit(scheduler: Scheduler, text: Text, sampler: Stamped) -> Request:
    return scheduler.submit_ids(np.concatenate([[BOS], text.prompt]), len(text.new), sampler=sampler, stop_at_eos=False)
