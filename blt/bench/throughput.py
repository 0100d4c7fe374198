"""How fast many streams generate together, and what a newcomer's prompt costs the others.

All requests run from the start; speed is that of the time in which every one of them writes, from the last first byte
to the first last one. Then all but one write, and one more prompt is read beside them.
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
from blt_runtime.errors import CapacityError, UsageError
from blt_runtime.ids import BOS

SHIFT = 3


class Stamped(Forced):
    """A forced sampler that notes when it was asked (seconds of `time.perf_counter`)."""

    def __init__(self, ids: Iterable[int], temperature: float) -> None:
        super().__init__(ids, temperature)
        self.stamps: list[float] = []

    def __call__(self, logits_V: NDArray[Any]) -> int:
        self.stamps.append(time.perf_counter())
        return super().__call__(logits_V)


@dataclass(frozen=True)
class Together:
    """One run of `streams` requests. Seconds; first_byte_s: median. patches_per_call: of the latent transformer."""

    streams: int
    bytes_per_s: float
    first_byte_s: float
    gaps_s: Sequence[float]
    patches_per_call: float
    mean_patch: float

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
        counts = replace(scheduler.counts)
        began = time.perf_counter()
        stamps = _run(scheduler, given, temperature)
        patches, calls = scheduler.counts.patches - counts.patches, scheduler.counts.latent_calls - counts.latent_calls
        tokens = scheduler.counts.tokens - counts.tokens
    start, end = max(s[0] for s in stamps), min(s[-1] for s in stamps)
    if start >= end:
        raise UsageError("the first stream was done before the last one wrote: measure with more --new-bytes")
    inside = [[at for at in s if start <= at <= end] for s in stamps]
    gaps = [gap for s in inside for gap in np.diff(s).tolist()]
    return Together(
        len(given),
        sum(max(0, len(s) - 1) for s in inside) / (end - start),
        statistics.median(s[0] - began for s in stamps),
        gaps,
        patches / max(1, calls),
        tokens / max(1, patches),
    )


def joined(model: Model, given: Sequence[Text], temperature: float, share: float, slice: int) -> Joined:
    """All texts but the last write; when a quarter is written, the last one's prompt is read."""
    with _scheduler(model, given, share, slice) as scheduler:
        _run(scheduler, [replace(text, new=text.new[:8]) for text in given], temperature)
        writers = [Stamped(text.new.tolist(), temperature) for text in given[:-1]]
        requests = [_submit(scheduler, text, w) for text, w in zip(given[:-1], writers, strict=True)]
        quarter = len(given[0].new) // 4
        while min(len(w.stamps) for w in writers) < quarter:
            time.sleep(0.002)
        newcomer = Stamped(given[-1].new[:2].tolist(), temperature)
        joins = time.perf_counter()
        _submit(scheduler, replace(given[-1], new=given[-1].new[:2]), newcomer).result()
        for request in requests:
            request.result()
    first = max(w.stamps[0] for w in writers)
    over = min(newcomer.stamps[0], *(w.stamps[-1] for w in writers))
    return Joined(
        [gap for w in writers for gap in _gaps(w.stamps, first, joins)],
        [gap for w in writers for gap in _gaps(w.stamps, joins, over)],
        newcomer.stamps[0] - joins,
    )


def _gaps(stamps: Sequence[float], start: float, end: float) -> list[float]:
    """Gaps that end between two times."""
    return [b - a for a, b in pairwise(stamps) if start < b <= end]


def _scheduler(model: Model, given: Sequence[Text], share: float, slice: int) -> Scheduler:
    longest = max(1 + len(text.prompt) + len(text.new) for text in given)
    if longest > model.spec.capacity_bytes:
        raise CapacityError(f"a run takes {longest} tokens, but a stream holds {model.spec.capacity_bytes}")
    return Scheduler(model, streams=len(given), capacity=longest, share=share, slice=slice)


def _run(scheduler: Scheduler, given: Sequence[Text], temperature: float) -> list[list[float]]:
    """When each byte of each text was chosen."""
    samplers = [Stamped(text.new.tolist(), temperature) for text in given]
    requests = [_submit(scheduler, text, sampler) for text, sampler in zip(given, samplers, strict=True)]
    for request in requests:
        request.result()
    return [sampler.stamps for sampler in samplers]


def _submit(scheduler: Scheduler, text: Text, sampler: Stamped) -> Request:
    return scheduler.submit_ids(np.concatenate([[BOS], text.prompt]), len(text.new), sampler)
