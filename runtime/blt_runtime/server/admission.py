"""Which requests run: the count of open ones, the answer to those that find no room, deadlines, and draining."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from ..errors import Cancelled
from .errors import RequestError, shutting_down
from .parts import Choice

LONGEST_WAIT = 60
"""Most seconds of a Retry-After."""


class Admission:
    """Counts the open requests of a server. streams: requests that the scheduler runs at a time."""

    def __init__(self, streams: int) -> None:
        self._streams, self._open, self._seconds = streams, 0, 1.0
        self.draining = False
        self._idle = asyncio.Event()

    @property
    def open(self) -> int:
        """Requests that are not answered yet."""
        return self._open

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Around one request. Raises RequestError while the server drains."""
        if self.draining:
            raise shutting_down()
        self._open += 1
        started = time.monotonic()
        try:
            yield
        finally:
            self._open -= 1
            self._seconds += 0.1 * (time.monotonic() - started - self._seconds)
            if self._open == 0:
                self._idle.set()

    def full(self, waiting: int) -> RequestError:
        """The answer to a request that finds the queue full. Retry-After is when a row should be free: the number that
        waits, times the mean seconds of recent requests, divided by the streams."""
        seconds = math.ceil(max(1.0, min(LONGEST_WAIT, waiting * self._seconds / self._streams)))
        message = f"{waiting} requests are waiting: try again in {seconds} s"
        return RequestError(message, status=429, code="queue_full", retry_after=seconds)

    async def drained(self, limit: float) -> bool:
        """Refuses new requests and waits up to `limit` seconds for the open ones. Whether all of them ended."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                while self._open:
                    self._idle.clear()
                    await self._idle.wait()
        return self._open == 0


@dataclass(frozen=True)
class Deadline:
    """A request ends `seconds` after it arrived. arrived: by the event loop's clock."""

    seconds: float
    arrived: float

    @property
    def end(self) -> float:
        return self.arrived + self.seconds

    def exceeded(self, reason: str) -> RequestError:
        message = f"the request did not end within {self.seconds:g} s: {reason}"
        return RequestError(message, status=503, code="deadline_exceeded")

    @contextlib.asynccontextmanager
    async def around(self) -> AsyncIterator[None]:
        """Around what a request waits for before it is submitted. Raises RequestError."""
        try:
            async with asyncio.timeout_at(self.end):
                yield
        except TimeoutError as error:
            raise self.exceeded("what it needs was not ready") from error


@contextlib.asynccontextmanager
async def ends_by(deadline: Deadline, choices: Sequence[Choice]) -> AsyncIterator[None]:
    """Cancels the choices at the deadline; their Cancelled then becomes a RequestError."""
    late = False

    def end() -> None:
        nonlocal late
        late = True
        for choice in choices:
            choice.cancel()

    timer = asyncio.get_running_loop().call_at(deadline.end, end)
    try:
        yield
    except Cancelled as error:
        if not late:
            raise
        raise deadline.exceeded("ask for fewer bytes") from error
    finally:
        timer.cancel()
