"""Batches requests on one model: admitted as rows become free, run together, cancelled at any byte.

One thread does all the work (`Batch.round`); callers wait for their own requests. Results are batch-invariant: a
request's bytes are the same whatever else runs in the batch.
"""

from __future__ import annotations

import copy
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal, Unpack

import numpy as np

from .arguments import instance, number, whole
from .backends.protocol import Array
from .engine.batch import SHARE, SLICE, Batch, Counts, Row, fitted, gather
from .engine.memory import out_of_memory
from .engine.snapshot import Snapshot
from .errors import BltError, Cancelled, CapacityError, QueueFull, UsageError, shown
from .ids import EOS, Ids, checked_ids, encode
from .model import Model
from .options import GenerateKeywords, GenerateOptions, Stop, resolve
from .sampling import Sampler
from .stream import BYTES, CHECK_EVERY
from .text import StopMatcher

log = logging.getLogger("blt_runtime")
MOST_STREAMS = 1 << 16

Finish = Literal["length", "stop", "eos", "cancelled", "error"]


class Work:
    """The scheduler's side of a request. It holds no reference to the `Request`, so that a dropped one is noticed.

    out: the pieces, then None or the error that ended the request. cancelled: no caller can read the rest.
    """

    def __init__(
        self, ids: Array, n: int, sampler: Sampler, stop: Stop, stop_at_eos: bool, after: Snapshot | None
    ) -> None:
        self.ids, self.n, self.after = ids, whole("n", n), after
        self.read: Snapshot | None = None
        self.finish: Finish | None = None
        self.generated = 0
        self.cancelled = False
        self.out: queue.SimpleQueue[bytes | BltError | None] = queue.SimpleQueue()
        self._sampler, self._matcher, self._stop_at_eos = sampler, StopMatcher(stop), stop_at_eos

    def choose(self, logits_V: Array) -> int | Finish:
        """Chooses the next id, or returns why the text ends here."""
        id = self._sampler(logits_V)
        if self._stop_at_eos and id == EOS:
            return "eos"
        self.generated += 1
        if piece := self._matcher.feed(BYTES[id]):
            self.out.put(piece)
        if self._matcher.stopped:
            return "stop"
        return id if self.generated < self.n else "length"

    def end(self, finish: Finish, error: BltError | None = None) -> None:
        if self.finish is not None:
            return
        rest = self._matcher.flush() if finish in ("length", "eos") else b""
        self.finish = finish
        if rest:
            self.out.put(rest)
        self.out.put(error)


class Request:
    """A prompt and its continuation. Made by `Scheduler.submit`; iterate over it for the bytes as they are generated.

    A request whose bytes can no longer be read is cancelled, and its row is freed: one that is dropped, and one whose
    iterator was closed or dropped before its end (a loop that was left by `break`).

    Example:
        request = scheduler.submit("Once upon a time", 200)
        for piece in request:
            sys.stdout.buffer.write(piece)
        print(request.finish)
    """

    def __init__(
        self,
        ids: Array,
        n: int,
        sampler: Sampler,
        *,
        stop: Stop = None,
        stop_at_eos: bool = True,
        after: Snapshot | None = None,
    ) -> None:
        self._work = Work(ids, n, sampler, stop, stop_at_eos, after)

    def __del__(self) -> None:
        if work := self.__dict__.get("_work"):
            work.cancelled = True

    @property
    def finish(self) -> Finish | None:
        """Why it ended: "length", "stop", "eos", "cancelled" or "error". None while it runs or waits."""
        return self._work.finish

    @property
    def generated(self) -> int:
        """The tokens generated so far."""
        return self._work.generated

    def cancel(self) -> None:
        """Ends the request before its next byte, also while its prompt is read or while it waits for a row."""
        self._work.cancelled = True

    def __iter__(self) -> Iterator[bytes]:
        """The bytes as they are generated, in pieces that are never empty, until the request ends. Raises the BltError
        that ended it, Cancelled included."""
        out = self._work.out
        try:
            while (piece := out.get()) is not None:
                if isinstance(piece, BltError):
                    out.put(piece)  # for the next caller
                    raise copy.copy(piece)  # its traceback would keep the caller's frames alive with the request
                yield piece
        except GeneratorExit:
            self.cancel()
            raise
        out.put(None)

    def result(self) -> bytes:
        """Waits for the end and returns all bytes that no iteration has returned yet."""
        return b"".join(self)


class Scheduler:
    """Runs requests in a batch, on a model opened with `batched=True`. Close it, or use it as a context.

    streams: requests that run at a time. capacity: bytes of one stream, less than the bundle's to save memory. waiting:
    requests that may wait for a row before `submit` raises QueueFull. slice: bytes of a prompt that are read in one
    round while other rows generate. share: the share of rows that must wait at a boundary before the latent transformer
    runs (`batch.gather`). Raises UsageError, and OutOfMemory for more streams than fit.

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
    ) -> None:
        instance("model", model, Model, "a Model")
        streams, waiting = whole("streams", streams, 1, MOST_STREAMS), whole("waiting", waiting)
        slice = whole("slice", slice, 1)
        share = number("share", share, lambda value: 0 <= value <= 1, "a number between 0 and 1")
        spec = fitted(model.spec, capacity)
        try:
            self._batch = Batch(spec, model.backend, model.hash_tables, rows=streams, slice=slice, ready=gather(share))
        except MemoryError as error:
            raise out_of_memory(spec, error) from error
        self._spec, self._capacity, self._vocab = spec, spec.capacity_bytes, spec.vocab_size
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
        options: GenerateOptions | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Request:
        """A request for up to `n` bytes that continue `prompt`. The prompt follows BOS, or the snapshot `after`, which
        `read` returned.

        options, keywords: see `GenerateOptions`; a keyword replaces a field of `options`. A scheduler does not
        speculate.

        Raises UsageError for bad arguments, CapacityError if the bytes do not fit, and QueueFull. A text that needs
        too many patches fails while it runs.
        """
        return self._submit(encode(prompt, bos=after is None), n, resolve(options, keywords), after=after)

    def read(self, prefix: str | bytes) -> Snapshot:
        """Reads BOS and a prefix that prompts share, such as a system prompt, once. Submit those prompts with the
        returned snapshot as `after`. Raises CapacityError and QueueFull."""
        request = self._queue(Request(encode(prefix, bos=True), 0, Sampler(0.0)))
        request.result()
        snapshot = request._work.read
        assert snapshot is not None
        return snapshot

    def submit_ids(
        self,
        ids: Array,
        n: int,
        *,
        sampler: Sampler | None = None,
        after: Snapshot | None = None,
        options: GenerateOptions | None = None,
        **keywords: Unpack[GenerateKeywords],
    ) -> Request:
        """A request for up to `n` ids that continue ids [N]; no BOS is added.

        sampler: chooses the ids in place of temperature, top_k, top_p, min_p and seed. Everything else as for `submit`.
        """
        chosen = resolve(options, keywords, sampler)
        return self._submit(checked_ids(ids, self._vocab), n, chosen, sampler=sampler, after=after)

    def _submit(
        self, ids: Ids, n: int, options: GenerateOptions, *, sampler: Sampler | None = None, after: Snapshot | None
    ) -> Request:
        if options.speculate != "off":
            raise UsageError("a scheduler does not speculate: leave speculate at 'off'")
        n = whole("n", n, 1)
        if len(ids) < 1:
            raise UsageError("a request needs a prompt of at least 1 id")
        if after is not None:
            instance("after", after, Snapshot, "what Scheduler.read returned")
            self._batch.check(after)
        sampler = sampler or options.sampler()
        request = Request(ids, n, sampler, stop=options.stop, stop_at_eos=options.stop_at_eos, after=after)
        return self._queue(request)

    def _queue(self, request: Request) -> Request:
        self._check_files()
        work = request._work
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
        return request

    @property
    def counts(self) -> Counts:
        """Counts of calls, tokens and patches so far."""
        return self._batch.counts

    @property
    def load(self) -> tuple[int, int]:
        """The number of requests that run, and of those that wait."""
        return len(self._running), len(self._waiting)

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
        for row in self._batch.round():
            self._guarded(row, self._running[row.index][1], self._next)

    def _guarded(self, row: Row, work: Work, do: Callable[[Row, Work], None]) -> None:
        """Runs one request's share of a round. An error there (a full row, the caller's sampler) ends only this one."""
        try:
            do(row, work)
        except Exception as error:
            self._leave(row, work, "error", self._failure(error))

    def _next(self, row: Row, work: Work) -> None:
        """Chooses the next id of a row that has read all its ids, or ends the request."""
        if row.error is not None:
            raise row.error
        if work.n == 0:
            work.read = self._batch.snapshot(row)
            return self._leave(row, work, "length")
        chosen = work.choose(row.logits_V)
        if isinstance(chosen, str):
            return self._leave(row, work, chosen)
        return row.feed(np.array([chosen]))

    def _begin(self, row: Row, work: Work) -> None:
        if work.after is not None:
            self._batch.restore(row, work.after)
        row.feed(work.ids)

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
