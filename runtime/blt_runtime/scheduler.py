"""Batches requests on one model: admitted as rows become free, run together, cancelled at any byte.

One thread does all the work (`Batch.round`); callers wait for their own requests. Results are batch-invariant: a
request's bytes are the same whatever else runs in the batch.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable
from functools import partial
from typing import Unpack

import numpy as np

from .arguments import flag, instance, number, whole
from .backends.protocol import Array
from .engine.batch import SHARE, SLICE, Batch, Counts, Row, fitted, gather
from .engine.memory import out_of_memory
from .engine.prefixes import PrefixCache
from .engine.snapshot import Snapshot
from .errors import BltError, Cancelled, CapacityError, QueueFull, UsageError, shown
from .ids import VOCAB, Ids, checked_ids, encode
from .model import Model
from .options import GenerateKeywords, GenerateOptions, resolve
from .requests import Details, Finish, Request, Work
from .sampling import Sampler, choose_all
from .stream import CHECK_EVERY

log = logging.getLogger("blt_runtime")
MOST_STREAMS = 1 << 16


class Scheduler:
    """Runs requests in a batch, on a model opened with `batched=True`. Close it, or use it as a context.

    streams: requests that run at a time. capacity: bytes of one stream, less than the bundle's to save memory. waiting:
    requests that may wait for a row before `submit` raises QueueFull. slice: bytes of a prompt that are read in one
    round while other rows generate. share: the share of rows that must wait at a boundary before the latent transformer
    runs (`batch.gather`). prefix_bytes: memory for snapshots of prompts, so that a prompt with the same beginning as
    an earlier one does not read it again; results are bit-identical. Raises UsageError, and OutOfMemory for more
    streams than fit.

    Example:
        with Scheduler(Model.open("bundle", batched=True), streams=16) as scheduler:
            requests = [scheduler.submit(f"Chapter {i}", 200, seed=i) for i in range(40)]
            texts = [request.result() for request in requests]
    """

    def __init__(
        self,
        model: Model,
        *,
        streams: int = 16,
        capacity: int | None = None,
        waiting: int = 1024,
        slice: int = SLICE,
        share: float = SHARE,
        prefix_bytes: int = 0,
    ) -> None:
        instance("model", model, Model, "a Model")
        streams, waiting = whole("streams", streams, 1, MOST_STREAMS), whole("waiting", waiting)
        slice, prefix_bytes = whole("slice", slice, 1), whole("prefix_bytes", prefix_bytes)
        share = number("share", share, lambda value: 0 <= value <= 1, "a number between 0 and 1")
        spec = fitted(model.spec, capacity)
        try:
            self._batch = Batch(spec, model.backend, model.hash_tables, rows=streams, slice=slice, ready=gather(share))
        except MemoryError as error:
            raise out_of_memory(spec, error) from error
        self._prefixes = PrefixCache(prefix_bytes, self._batch.slice) if prefix_bytes else None
        self._spec = spec = self._batch.spec
        self._capacity, self._vocab = spec.capacity_bytes, spec.vocab_size
        self._max_waiting, self._streams = waiting, streams
        self._waiting: deque[Work] = deque()
        self._running: dict[int, tuple[Row, Work]] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._check_files = model.files.check if model.files is not None else lambda: None
        self._rounds = 0
        self._thread = threading.Thread(target=self._work, name="blt-scheduler", daemon=True)
        self._thread.start()

    def submit(
        self,
        prompt: str | bytes,
        n: int,
        *,
        after: Snapshot | None = None,
        tokens: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: bool = False,
        prefix_group: Hashable = None,
        options: GenerateOptions | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Request:
        """A request for up to `n` bytes that continue `prompt`. The prompt follows BOS, or the snapshot `after`, which
        `read` returned.

        tokens: the request's `tokens()` are read instead of its bytes. logprobs: with tokens, each has its logprob and
        those of this many most likely ids. prompt_logprobs: `Request.prompt` gets the prompt's tokens with logprobs;
        n may be 0 then. prefix_group: prompts share snapshots within a group only (see `prefix_bytes`).
        options, keywords: see `GenerateOptions`; a keyword replaces a field of `options`. A scheduler does not
        speculate.

        Raises UsageError for bad arguments, CapacityError if the bytes do not fit, and QueueFull. A text that needs
        too many patches fails while it runs.
        """
        details = _details(tokens, logprobs, prompt_logprobs)
        chosen = resolve(options, keywords)
        ids = encode(prompt, bos=after is None)
        return self._submit(ids, n, chosen, chosen.sampler(), after=after, details=details, group=prefix_group)

    def read(self, prefix: str | bytes) -> Snapshot:
        """Reads BOS and a prefix that prompts share, such as a system prompt, once. Submit those prompts with the
        returned snapshot as `after`. Raises CapacityError and QueueFull."""
        work = Work(encode(prefix, bos=True), 0, Sampler(0.0))
        self._queue(work).result()
        assert work.read is not None
        return work.read

    def submit_ids(
        self,
        ids: Array,
        n: int,
        *,
        sampler: Sampler | None = None,
        after: Snapshot | None = None,
        tokens: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: bool = False,
        prefix_group: Hashable = None,
        options: GenerateOptions | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Request:
        """A request for up to `n` ids that continue ids [N]; no BOS is added.

        sampler: chooses the ids in place of temperature, top_k, top_p, min_p and seed. Everything else as for `submit`.
        """
        details = _details(tokens, logprobs, prompt_logprobs)
        chosen = resolve(options, keywords, sampler)
        sampler = sampler or chosen.sampler()
        found = checked_ids(ids, self._vocab)
        return self._submit(found, n, chosen, sampler, after=after, details=details, group=prefix_group)

    def _submit(
        self,
        ids: Ids,
        n: int,
        options: GenerateOptions,
        sampler: Sampler,
        *,
        after: Snapshot | None,
        details: Details,
        group: Hashable,
    ) -> Request:
        if options.speculate != "off":
            raise UsageError("a scheduler does not speculate: leave speculate at 'off'")
        n = whole("n", n, 0 if details.prompt else 1)
        if len(ids) < 1:
            raise UsageError("a request needs a prompt of at least 1 id")
        if after is not None:
            instance("after", after, Snapshot, "what Scheduler.read returned")
            self._batch.check(after)
            if details.prompt:
                raise UsageError("prompt_logprobs needs the whole prompt: leave `after` out")
        try:
            hash(group)
        except (TypeError, RecursionError) as error:
            raise UsageError("prefix_group must be a name or another hashable value") from error
        stop, at_eos = options.stop, options.stop_at_eos
        return self._queue(
            Work(ids, n, sampler, stop=stop, stop_at_eos=at_eos, after=after, details=details, group=group)
        )

    def _queue(self, work: Work) -> Request:
        self._check_files()
        tokens = len(work.ids) + (work.after.position if work.after else 0)
        if tokens + max(0, work.n - 1) > self._capacity:
            raise CapacityError(
                f"{tokens} tokens of prompt and {shown(work.n)} new ones exceed the {self._capacity} of a stream here"
            )
        with self._wake:
            if self._closed:
                raise UsageError("the scheduler is closed")
            if len(self._waiting) >= self._max_waiting + self._streams - len(self._running):
                raise QueueFull(f"{self._max_waiting} requests are already waiting: try again later")
            self._waiting.append(work)
            self._wake.notify()
        return Request(work)

    @property
    def counts(self) -> Counts:
        """Counts of calls, tokens and patches so far."""
        return self._batch.counts

    @property
    def prefix_counts(self) -> tuple[int, int]:
        """The prompt tokens that were looked up in the prefix cache so far, and those that were found there."""
        return (self._prefixes.queries, self._prefixes.hits) if self._prefixes else (0, 0)

    @property
    def load(self) -> tuple[int, int]:
        """The number of requests that run, and of those that wait."""
        return len(self._running), len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether requests can run: it is not closed, and its thread has not failed."""
        return not self._closed and self._thread.is_alive()

    def close(self) -> None:
        """Cancels everything and ends the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        try:
            while self._wait():
                try:
                    self._run_round()
                except Exception as error:  # a call failed for all rows; later requests still run
                    for row, work in list(self._running.values()):
                        self._leave(row, work, "error", self._failure(error))
        finally:
            with self._wake:
                self._closed = True
            left = [work for _, work in self._running.values()] + list(self._waiting)
            self._running.clear()
            self._waiting.clear()
            for work in left:
                work.end("cancelled", Cancelled("the scheduler was closed"))

    def _failure(self, error: Exception) -> BltError:
        if isinstance(error, BltError):
            return error
        if isinstance(error, MemoryError):
            return out_of_memory(self._spec, error)
        log.error("a request failed with an unexpected error", exc_info=error)
        return BltError(f"the request failed with an unexpected error: {error!r}")

    def _wait(self) -> bool:
        """Waits for a request; False when closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._waiting or self._running)
            return not self._closed

    def _run_round(self) -> None:
        self._rounds += 1
        if self._rounds % CHECK_EVERY == 0:
            self._check_files()
        self._drop_cancelled()
        self._admit()
        ready = [self._running[row.index] for row in self._batch.round()]
        choosing = [(row, work) for row, work in ready if work.chooses(row)]
        plain = [(row, work) for row, work in choosing if type(work.sampler) is Sampler]
        ids = choose_all([work.sampler for _, work in plain], [row.logits_V for row, _ in plain])
        chosen = {row.index: id for (row, _), id in zip(plain, ids, strict=True)}
        for row, work in ready:
            self._guarded(row, work, partial(self._next, chosen.get(row.index)))

    def _guarded(self, row: Row, work: Work, do: Callable[[Row, Work], None]) -> None:
        """Runs one request's share of a round. An error there (a full row, the caller's sampler) ends only this one."""
        try:
            do(row, work)
        except Exception as error:
            self._leave(row, work, "error", self._failure(error))

    def _next(self, id: int | None, row: Row, work: Work) -> None:
        """Chooses the next id of a row that has read all its ids (unless it was chosen: `id`), or ends the request."""
        if row.error is not None:
            raise row.error
        if len(work.rest):
            return self._read_rest(row, work)
        work.describe_prompt(row)
        if work.n == 0:
            work.read = None if work.details.prompt else self._batch.snapshot(row)
            return self._leave(row, work, "length")
        chosen = work.choose(row, work.sampler(row.logits_V) if id is None else id)
        if isinstance(chosen, str):
            return self._leave(row, work, chosen)
        return row.feed(np.array(chosen), prompt=False)

    def _begin(self, row: Row, work: Work) -> None:
        work.begin(row)
        if work.after is not None:
            self._batch.restore(row, work.after)
        elif self._prefixes is not None and not work.details.prompt:
            return self._begin_after_prefix(row, work, self._prefixes)
        row.feed(work.ids)

    def _begin_after_prefix(self, row: Row, work: Work, prefixes: PrefixCache) -> None:
        """Restores the longest cached beginning of the prompt, and reads up to the next place for a snapshot."""
        if (snapshot := prefixes.longest(work.ids, work.group)) is not None:
            self._batch.restore(row, snapshot)
            work.reused = snapshot.position
        work.places = prefixes.places(work.ids, work.reused, work.group)
        self._feed_to_place(row, work)

    def _feed_to_place(self, row: Row, work: Work) -> None:
        end = work.places.pop(0) if work.places else len(work.ids)
        row.feed(work.ids[row.placed : end])
        work.rest = work.ids[end:]

    def _read_rest(self, row: Row, work: Work) -> None:
        """Keeps a snapshot of the part of the prompt that was read, and reads on."""
        assert self._prefixes is not None
        self._prefixes.add(work.ids[: row.placed], self._batch.snapshot(row), work.group)
        self._feed_to_place(row, work)

    def _admit(self) -> None:
        while self._waiting and (row := self._batch.open()) is not None:
            with self._wake:
                work = self._waiting.popleft()
                self._running[row.index] = row, work
            self._guarded(row, work, self._begin)

    def _drop_cancelled(self) -> None:
        for row, work in list(self._running.values()):
            if work.cancelled:
                self._leave(row, work, "cancelled", Cancelled("the request was cancelled"))
        with self._wake:
            gone = [work for work in self._waiting if work.cancelled]
            for work in gone:
                self._waiting.remove(work)
        for work in gone:
            work.end("cancelled", Cancelled("the request was cancelled"))

    def _leave(self, row: Row, work: Work, finish: Finish, error: BltError | None = None) -> None:
        if self._running.pop(row.index, None) is not None:
            self._batch.close(row)
        work.end(finish, error)


def _details(tokens: bool, logprobs: int | None, prompt_logprobs: bool) -> Details:
    """Raises UsageError for a wrong type or value."""
    flag("tokens", tokens)
    flag("prompt_logprobs", prompt_logprobs)
    if logprobs is not None:
        logprobs = whole("logprobs", logprobs, 0, VOCAB)
        if not tokens:
            raise UsageError("logprobs are part of the tokens: submit with tokens=True")
    return Details(tokens=tokens, logprobs=logprobs, prompt=prompt_logprobs)
