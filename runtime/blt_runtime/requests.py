"""A request of a `Scheduler`: the caller's side (`Request`), the scheduler's side (`Work`), and what passes between.

The scheduler's thread puts pieces into an `Outbox`. One reader takes them out, blocking or on an asyncio event loop.

Letters: S tokens of a segment, V vocabulary, K most likely ids.
"""

from __future__ import annotations

import copy
import functools
import queue
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .arguments import instance
from .backends.protocol import Array
from .engine.batch import Row
from .engine.snapshot import Snapshot
from .errors import BltError, UsageError
from .ids import BYTES, EOS, Ids
from .options import Stop
from .sampling import Sampler
from .text import StopMatcher

Finish = Literal["length", "stop", "eos", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a request that was submitted with `tokens=True`, or of its prompt.

    id: None for a last piece without a token. piece: the bytes that this token releases: b"" for a special id, and
    while bytes are held back because they may begin a stop string. logprob: ln p of the id under softmax(logits),
    before temperature and trimming; None if it was not asked for, and for the first id of a text. top: the K most
    likely ids with their logprobs, in this order; the lower id wins ties. entropy: of the entropy model before this
    token, in nats; NaN without one. starts_patch: whether a patch begins with this token.

    Example:
        for token in scheduler.submit("Once", 50, tokens=True, logprobs=3).tokens():
            print(token.piece, token.logprob, token.entropy, token.starts_patch)
    """

    id: int | None
    piece: bytes
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    entropy: float
    starts_patch: bool


Score = tuple[float | None, tuple[tuple[int, float], ...]]
NO_SCORE: Score = None, ()
Item = bytes | Token | BltError | None


class Outbox:
    """The pieces of one request on their way from the scheduler's thread to one reader."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._wake: Callable[[], object] | None = None

    def put(self, item: Item) -> None:
        """Appends a piece, the error that ended the request, or None at its end."""
        self._items.put(item)
        if (wake := self._wake) is not None:
            self._wake = None
            try:
                wake()
            except RuntimeError:  # the reader's event loop is closed
                return

    def get(self) -> Item:
        """The next item; waits for it."""
        return self._items.get()

    async def get_async(self) -> Item:
        """The next item; waits for it on the running event loop."""
        import asyncio

        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        while True:
            try:
                return self._items.get_nowait()
            except queue.Empty:
                ready.clear()
                self._wake = functools.partial(loop.call_soon_threadsafe, ready.set)
                if self._items.empty():  # nothing was put before `put` could see the new `_wake`
                    await ready.wait()


@dataclass(frozen=True, kw_only=True)
class Details:
    """What a request reports beside its bytes. tokens: pieces are `Token`s. logprobs: K. prompt: score the prompt."""

    tokens: bool = False
    logprobs: int | None = None
    prompt: bool = False


class Work:
    """The scheduler's side of a request. It holds no reference to the `Request`, so that a dropped one is noticed.

    out: the pieces, then None or the error that ended the request. cancelled: no caller can read the rest. group:
    requests of one group share the prefix cache. places: lengths of beginnings of the prompt after which a snapshot is
    taken. rest: the ids of the prompt that the row reads after that.
    """

    def __init__(
        self,
        ids: Ids,
        n: int,
        sampler: Sampler,
        *,
        stop: Stop = None,
        stop_at_eos: bool = True,
        after: Snapshot | None = None,
        details: Details | None = None,
        group: Hashable = None,
    ) -> None:
        self.ids, self.n, self.after, self.group = ids, n, after, group
        self.details = details or Details()
        self.places: list[int] = []
        self.rest: Ids = ids[:0]
        self.read: Snapshot | None = None
        self.finish: Finish | None = None
        self.generated = self.reused = 0
        self.cancelled = False
        self.prompt: list[Token] | None = None
        self.waited: float | None = None
        self.out = Outbox()
        self._submitted = time.perf_counter()
        self._scores: list[Score] = []
        self.sampler, self._matcher, self._stop_at_eos = sampler, StopMatcher(stop), stop_at_eos

    def begin(self, row: Row) -> None:
        """The row begins to read the prompt."""
        self.waited = time.perf_counter() - self._submitted
        if self.details.prompt:
            row.on_logits = self._score

    def _score(self, ids_S: Ids, logits_SV: Array) -> None:
        """Keeps the logprobs of the next ids of the prompt. ids [S] follow the tokens of logits [S, V]."""
        most = self.details.logprobs or 0
        for id, logits_V in zip(ids_S.tolist(), logits_SV, strict=False):  # the last token's next id is not known
            self._scores.append(logprobs(logits_V, id, most))

    def describe_prompt(self, row: Row) -> None:
        """Makes `prompt`, once the row has read all of it."""
        if not self.details.prompt or self.prompt is not None:
            return
        row.on_logits = None
        scores = [NO_SCORE, *self._scores]
        self.prompt = [
            Token(id, BYTES[id], *score, *patch_facts(row, position))
            for position, (id, score) in enumerate(zip(self.ids.tolist(), scores, strict=True))
        ]

    def chooses(self, row: Row) -> bool:
        """Whether the row has read all there is to read, and the next id is to be chosen."""
        return row.error is None and not len(self.rest) and self.n > 0

    def choose(self, row: Row, id: int) -> list[int] | Finish:
        """Takes the id that the sampler chose and those that it forces after it, or returns why the text ends here."""
        ids = [id]
        if not self.details.tokens:
            ids += self.sampler.forced()
        for id in ids:
            if self._stop_at_eos and id == EOS:
                return "eos"
            self.generated += 1
            self._emit(row, id)
            if self._matcher.stopped:
                return "stop"
            if self.generated == self.n:
                return "length"
        return ids

    def _emit(self, row: Row, id: int) -> None:
        piece = self._matcher.feed(BYTES[id])
        if self.details.tokens:
            logprob, top = NO_SCORE
            if self.details.logprobs is not None:
                logprob, top = logprobs(row.logits_V, id, self.details.logprobs)
            self.out.put(Token(id, piece, logprob, top, *patch_facts(row, row.memory.position)))
        elif piece:
            self.out.put(piece)

    def end(self, finish: Finish, error: BltError | None = None) -> None:
        if self.finish is not None:
            return
        rest = self._matcher.flush() if finish in ("length", "eos") else b""
        self.finish = finish
        if rest:
            self.out.put(Token(None, rest, None, (), float("nan"), False) if self.details.tokens else rest)
        self.out.put(error)


def logprobs(logits_V: Array, id: int, most: int) -> Score:
    """ln softmax(logits)[id] in float64, and the `most` most likely ids with theirs; the lower id wins ties."""
    wide_V = logits_V.astype(np.float64)
    wide_V -= wide_V.max()
    log_V = wide_V - np.log(np.exp(wide_V).sum())
    top = np.argsort(-log_V, kind="stable")[:most] if most else ()
    return float(log_V[id]), tuple((int(i), float(log_V[i])) for i in top)


def patch_facts(row: Row, position: int) -> tuple[float, bool]:
    """The entropy before the token at `position` (NaN for the first, and without an entropy model), and whether a patch
    begins there."""
    memory = row.memory
    entropy = float(memory.entropies.array[0, position - 1]) if position else float("nan")
    starts_P = memory.starts_P[: memory.patches + 1]
    at = int(np.searchsorted(starts_P, position))
    return entropy, at < len(starts_P) and int(starts_P[at]) == position


class Request:
    """A prompt and its continuation. Made by `Scheduler.submit`; iterate over it for the bytes as they are generated,
    with `for` or, on an event loop, with `async for`. One reader at a time.

    A request whose bytes can no longer be read is cancelled, and its row is freed: one that is dropped, one whose
    iterator was closed or dropped before its end (a loop that was left by `break`), and one whose task was cancelled.

    Example:
        request = scheduler.submit("Once upon a time", 200)
        for piece in request:
            sys.stdout.buffer.write(piece)
        print(request.finish)
    """

    def __init__(self, work: Work) -> None:
        instance("work", work, Work, "what a Scheduler made; call Scheduler.submit")
        self._work = work

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

    @property
    def reused(self) -> int:
        """Tokens of the prompt that were not read again, because the prefix cache had them."""
        return self._work.reused

    @property
    def waited(self) -> float | None:
        """Seconds between `submit` and the first round; None while it waits."""
        return self._work.waited

    @property
    def prompt(self) -> list[Token] | None:
        """The prompt's tokens with logprobs, if submitted with `prompt_logprobs`. None until the prompt is read; it is
        there before the first piece."""
        return self._work.prompt

    def cancel(self) -> None:
        """Ends the request before its next byte, also while its prompt is read or while it waits for a row."""
        self._work.cancelled = True

    def __iter__(self) -> Iterator[bytes]:
        """The bytes as they are generated, in pieces that are never empty, until the request ends. Raises the BltError
        that ended it, Cancelled included."""
        for item in self._items():
            if piece := _bytes(item):
                yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """As `__iter__`, on the running event loop."""
        async with aclosing(self._items_async()) as items:
            async for item in items:
                if piece := _bytes(item):
                    yield piece

    def tokens(self) -> Tokens:
        """The `Token`s as they are generated, for `for` and `async for`. Raises UsageError unless the request was
        submitted with `tokens=True`."""
        if not self._work.details.tokens:
            raise UsageError("this request has pieces of bytes: submit it with tokens=True")
        return Tokens(self)

    def result(self) -> bytes:
        """Waits for the end and returns all bytes that no iteration has returned yet."""
        return b"".join(self)

    async def result_async(self) -> bytes:
        """As `result`, on the running event loop."""
        return b"".join([piece async for piece in self])

    def _items(self) -> Iterator[bytes | Token]:
        out = self._work.out
        try:
            while (item := out.get()) is not None:
                yield self._checked(item)
        except GeneratorExit:
            self.cancel()
            raise
        out.put(None)

    async def _items_async(self) -> AsyncGenerator[bytes | Token, None]:
        import asyncio

        out = self._work.out
        try:
            while (item := await out.get_async()) is not None:
                yield self._checked(item)
        except (GeneratorExit, asyncio.CancelledError):
            self.cancel()
            raise
        out.put(None)

    def _checked(self, item: bytes | Token | BltError) -> bytes | Token:
        """The item. Raises it if it is an error, after putting it back for the next caller."""
        if isinstance(item, BltError):
            self._work.out.put(item)
            raise copy.copy(item)  # its traceback would keep the caller's frames alive with the request
        return item


def _bytes(item: bytes | Token) -> bytes:
    return item.piece if isinstance(item, Token) else item


class Tokens:
    """The tokens of a request, for `for` and `async for`. Made by `Request.tokens`."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def __iter__(self) -> Iterator[Token]:
        return (item for item in self._request._items() if isinstance(item, Token))

    def __aiter__(self) -> AsyncIterator[Token]:
        return self._read_async()

    async def _read_async(self) -> AsyncIterator[Token]:
        async with aclosing(self._request._items_async()) as items:
            async for item in items:
                assert isinstance(item, Token)
                yield item
