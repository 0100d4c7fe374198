"""Metrics for Prometheus, under the names of vLLM's where vLLM has the metric; `blt:` names are ours.

With several worker processes, `PROMETHEUS_MULTIPROC_DIR` is set before this module is imported, and every worker
answers with the sums of all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from ..scheduler import Scheduler

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Buckets in seconds.
_MILLISECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75)
_FIRST = (*_MILLISECONDS, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_BETWEEN = (0.0001, 0.0002, 0.0005, *_MILLISECONDS, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
LABELS = ("model_name", "engine")


class Metrics:
    """The metrics of one server process. length: most tokens of a request. streams: requests that run at a time."""

    def __init__(self, model: str, length: int, streams: int) -> None:
        self._streams = streams
        self._registry = CollectorRegistry()
        self._values = {"model_name": model, "engine": "0"}
        sizes = [m * 10**e for e in range(8) for m in (1, 2, 5) if m * 10**e <= length]
        self._running = self._gauge("vllm:num_requests_running", "Requests that generate or read their prompt.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait for a row.")
        self._usage = self._gauge("vllm:kv_cache_usage_perc", "Share of the rows in use, 0 to 1.")
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
        self._patch = self._gauge("blt:bytes_per_patch", "Mean bytes of a patch so far.")
        self._shared = self._gauge("blt:patches_per_latent_call", "Mean patches of a call of the latent transformer.")
        self._seen = (0, 0)

    def _gauge(self, name: str, text: str) -> Gauge:
        mode = "livemostrecent" if name.startswith("blt:") or name.endswith("perc") else "livesum"
        made = Gauge(name, text, LABELS, registry=self._registry, multiprocess_mode=mode)  # type: ignore[arg-type]
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
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self._registry)
        merged = CollectorRegistry()
        MultiProcessCollector(merged)  # type: ignore[no-untyped-call]
        return generate_latest(merged)

    def update(self, scheduler: Scheduler) -> None:
        """Reads the state of the scheduler."""
        running, waiting = scheduler.load
        self._running.set(running)
        self._waiting.set(waiting)
        self._usage.set(running / self._streams)
        counts, (queries, hits) = scheduler.counts, scheduler.prefix_counts
        self._queries.inc(queries - self._seen[0])
        self._hits.inc(hits - self._seen[1])
        self._seen = queries, hits
        if counts.patches:
            self._patch.set(counts.tokens / counts.patches)
            self._shared.set(counts.patches / counts.latent_calls)


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
