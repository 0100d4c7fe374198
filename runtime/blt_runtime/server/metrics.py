"""Metrics for Prometheus, under the names of vLLM's where vLLM has the metric; `blt:` names are ours.

With several worker processes (`share`, or `PROMETHEUS_MULTIPROC_DIR` set before this module is imported), every worker
answers with the sums of all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from ..scheduler import Scheduler

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Buckets in seconds.
_MILLISECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75)
_FIRST = (*_MILLISECONDS, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_BETWEEN = (0.0001, 0.0002, 0.0005, *_MILLISECONDS, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
LABELS = ("model_name", "engine")
RATIOS = (
    ("vllm:kv_cache_usage_perc", "Share of the rows in use, 0 to 1.", "vllm:num_requests_running", "blt:rows"),
    ("blt:bytes_per_patch", "Mean bytes of a patch so far.", "blt:tokens_total", "blt:patches_total"),
    (
        "blt:patches_per_latent_call",
        "Mean patches of a call of the latent transformer.",
        "blt:patches_total",
        "blt:latent_calls_total",
    ),
)
"""Name, description, numerator and denominator: of the sums over all workers."""
REFRESH_SECONDS = 0.2
"""How old what a worker knows of the others may be."""
FOLDER = "PROMETHEUS_MULTIPROC_DIR"


def share(folder: str, worker: int) -> None:
    """This process keeps its metrics in `folder`, where the other workers read them; call it before `Metrics`.

    A worker that replaces another has its number, and goes on with its counters.
    """
    os.environ[FOLDER] = folder
    values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]


def forget(folder: str, worker: int) -> None:
    """The worker has ended: it runs no requests. Its counters stay."""
    mark_process_dead(worker, folder)  # type: ignore[no-untyped-call]


class Metrics:
    """The metrics of one server process. length: most tokens of a request. streams: requests that run at a time."""

    def __init__(self, model: str, length: int, streams: int) -> None:
        self._registry = CollectorRegistry()
        self._values = {"model_name": model, "engine": "0"}
        sizes = [m * 10**e for e in range(8) for m in (1, 2, 5) if m * 10**e <= length]
        self._running = self._gauge("vllm:num_requests_running", "Requests that generate or read their prompt.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait for a row.")
        self._gauge("blt:rows", "Requests that can run at a time.").set(streams)
        self._queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._prompt = self._counter("vllm:prompt_tokens", "Prompt tokens of all requests.")
        self._generation = self._counter("vllm:generation_tokens", "Generated tokens.")
        self._success = Counter(
            "vllm:request_success", "Requests by how they ended.", (*LABELS, "finished_reason"), registry=self._registry
        )
        self._first = self._histogram("vllm:time_to_first_token_seconds", "From arrival to the first byte.", _FIRST)
        self._gap = self._histogram("vllm:inter_token_latency_seconds", "Between the bytes of a request.", _BETWEEN)
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the end.", _REQUEST)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Waiting for a row.", _REQUEST)
        self._asked = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", sizes)
        self._made = self._histogram("vllm:request_generation_tokens", "Generated tokens of a request.", sizes)
        self._totals = (
            self._queries,
            self._hits,
            self._counter("blt:tokens", "Tokens read by the model."),
            self._counter("blt:patches", "Patches read by the latent transformer."),
            self._counter("blt:latent_calls", "Calls of the latent transformer."),
        )
        self._seen = [0] * len(self._totals)

    def _gauge(self, name: str, text: str) -> Gauge:
        made = Gauge(name, text, LABELS, registry=self._registry, multiprocess_mode="livesum")
        return made.labels(**self._values)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, LABELS, registry=self._registry).labels(**self._values)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, LABELS, registry=self._registry, buckets=buckets).labels(**self._values)

    def begin(self, prompt: int) -> Watch:
        """A choice with a prompt of this many tokens was submitted."""
        self._prompt.inc(prompt)
        self._asked.observe(prompt)
        return Watch(self)

    def text(self, scheduler: Scheduler) -> bytes:
        """What `/metrics` answers."""
        self.update(scheduler)
        return generate_latest(_WithRatios(self._collected, self._values))

    def _collected(self) -> Iterable[Metric]:
        if FOLDER not in os.environ:
            return self._registry.collect()
        files = [str(path) for path in Path(os.environ[FOLDER]).glob("*.db") if _filled(path)]
        found: Iterable[Metric] = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
        return found

    def update(self, scheduler: Scheduler) -> None:
        """Reads the state of the scheduler."""
        running, waiting = scheduler.load
        self._running.set(running)
        self._waiting.set(waiting)
        counts = scheduler.counts
        now = [*scheduler.prefix_counts, counts.tokens, counts.patches, counts.latent_calls]
        for counter, value, seen in zip(self._totals, now, self._seen, strict=True):
            counter.inc(value - seen)
        self._seen = now

    @contextlib.asynccontextmanager
    async def refreshed(self, scheduler: Scheduler) -> AsyncIterator[None]:
        """Inside, the other workers know the state of this one's scheduler."""

        async def refresh() -> None:
            while FOLDER in os.environ:
                self.update(scheduler)
                await asyncio.sleep(REFRESH_SECONDS)

        task = asyncio.create_task(refresh())
        try:
            yield
        finally:
            task.cancel()


def _filled(path: Path) -> bool:
    """Whether the file is there, and not that of a worker which has just made it."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


class _WithRatios(Collector):
    """The collected metrics and the `RATIOS` of their values."""

    def __init__(self, collected: Callable[[], Iterable[Metric]], labels: dict[str, str]) -> None:
        self._collected, self._labels = collected, labels

    def collect(self) -> Iterator[Metric]:
        totals: dict[str, float] = {}
        for metric in self._collected():
            totals |= {sample.name: sample.value for sample in metric.samples}
            yield metric
        for name, text, over, under in RATIOS:
            found = GaugeMetricFamily(name, text, labels=LABELS)
            found.add_metric(list(self._labels.values()), totals[over] / totals[under] if totals[under] else 0.0)
            yield found


class Watch:
    """The times of one choice, from when it was submitted."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started = self._last = time.perf_counter()
        self._any = False

    def piece(self) -> None:
        """A piece arrived."""
        now = time.perf_counter()
        (self._metrics._gap if self._any else self._metrics._first).observe(now - self._last)
        self._any, self._last = True, now

    def end(self, reason: str, generated: int, waited: float | None) -> None:
        """reason: stop, length, abort or error. waited: seconds in the queue."""
        metrics = self._metrics
        metrics._generation.inc(generated)
        metrics._made.observe(generated)
        metrics._success.labels(**metrics._values, finished_reason=reason).inc()
        metrics._whole.observe(time.perf_counter() - self._started)
        if waited is not None:
            metrics._queue.observe(waited)
