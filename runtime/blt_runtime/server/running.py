"""One request from its submission to its answer: whole, or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Hashable, Sequence
from contextlib import ExitStack, aclosing
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ..errors import BltError, Cancelled, InputError, QueueFull
from ..scheduler import Scheduler
from .admission import Admission, Deadline, ends_by
from .answers import Answer, Json, usage
from .errors import RequestError, refusal, shutting_down
from .metrics import Metrics
from .parts import Choice, Part
from .plan import Plan

CLOSED = 499
"""The status of a request whose client went away, in logs only."""
_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"}


class Run:
    """A request that is admitted by `submit`, and must be closed: it is a context. facts: for the log."""

    def __init__(
        self,
        admission: Admission,
        metrics: Metrics,
        scheduler: Scheduler,
        answer: Answer,
        *,
        deadline: Deadline,
        facts: dict[str, Any],
    ) -> None:
        self._admission, self._metrics, self._scheduler = admission, metrics, scheduler
        self._deadline, self._stack = deadline, ExitStack()
        self.answer, self.choices = answer, list[Choice]()
        self.facts = facts
        facts["id"] = answer.id
        self._asked: list[int] = []
        self._matched: str | None = None

    def submit(self, plan: Plan, capacity: int, group: Hashable) -> None:
        """Hands the plan to the scheduler. Raises RequestError; nothing is left open then."""
        with ExitStack() as stack:
            stack.enter_context(self._admission.admitted())
            try:
                self.choices = plan.submit(self._scheduler, capacity, group)
            except QueueFull as error:
                raise self._admission.full(self._scheduler.load[1]) from error
            for choice in self.choices:
                choice.watch = self._metrics.begin(len(choice.prompt.sent))
                stack.callback(choice.close)
            self._matched = plan.matched
            self._asked = [len(prompt.sent) for prompt in plan.prompts]
            self._metrics.update(self._scheduler)
            self._stack = stack.pop_all()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._metrics.update(self._scheduler)
        self.facts["prompt_tokens"] = sum(self._asked)
        self.facts["completion_tokens"] = sum(choice.generated for choice in self.choices)
        self.facts["finish"] = ",".join(sorted({choice.finish_reason for choice in self.choices}))

    async def whole(self, receive: Receive) -> Response:
        """The response in one piece. Raises RequestError."""
        with self:
            client = Client()
            try:
                async with client.heard(receive, self.choices), ends_by(self._deadline, self.choices):
                    parts = await _collected(self.choices)
            except BltError as error:
                if client.gone:
                    return Response(status_code=CLOSED)
                raise self.failed(error) from error
            return JSONResponse(self.answer.whole(list(zip(self.choices, parts, strict=True)), self._usage()))

    async def events(self, include_usage: bool) -> AsyncGenerator[Json, None]:
        """The events of a stream. Raises the BltError that ended a choice."""
        extra: Json = {"usage": None} if include_usage else {}
        for choice in self.choices:
            if (first := self.answer.first(choice)) is not None:
                yield first | extra
        async with ends_by(self._deadline, self.choices), aclosing(_merged(self.choices)) as merged:
            async for choice, part in merged:
                if part is None:
                    yield self.answer.chunk(choice, Part(), choice.finish_reason) | extra
                else:
                    yield self.answer.chunk(choice, part) | extra
        if include_usage:
            yield self.answer.last(self._usage())

    def failed(self, error: BltError) -> RequestError:
        """The error of a request that did not end by itself."""
        if isinstance(error, Cancelled):
            return shutting_down()
        if isinstance(error, InputError) and self._matched is not None:  # a grammar that became too complex
            return RequestError(f"{self._matched}: {error}", param=self._matched)
        return refusal(error)

    def _usage(self) -> Json:
        return usage(self._asked, self.choices)


class EventResponse(Response):
    """A stream of server-sent events. It closes the run, whatever happens."""

    def __init__(self, run: Run, include_usage: bool) -> None:
        super().__init__(headers=_HEADERS)
        self._run, self._include_usage = run, include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        with self._run as run:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            client = Client()
            try:
                events = aclosing(run.events(self._include_usage))
                async with client.heard(receive, run.choices), events as found:
                    async for event in found:
                        await write(_event(event))
            except BltError as error:
                failed = run.failed(error)
                run.facts.update({"status": CLOSED} if client.gone else {"error": str(failed)})
                await write(_event(failed.body()))
            await write(b"data: [DONE]\n\n", more=False)


def _event(found: Json) -> bytes:
    return b"data: " + json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Client:
    """Whether the client of a request is still there."""

    gone = False

    @contextlib.asynccontextmanager
    async def heard(self, receive: Receive, choices: Sequence[Choice]) -> AsyncIterator[None]:
        """Cancels the choices when the client closes the connection."""

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.gone = True
            for choice in choices:
                choice.cancel()

        task = asyncio.create_task(listen())
        try:
            yield
        finally:
            task.cancel()


async def _collected(choices: Sequence[Choice]) -> list[list[Part]]:
    """All parts of each choice. If one fails, the others are cancelled by whoever closes them."""

    async def collect(choice: Choice) -> list[Part]:
        return [part async for part in choice.parts()]

    return list(await asyncio.gather(*map(collect, choices)))


async def _merged(choices: Sequence[Choice]) -> AsyncGenerator[tuple[Choice, Part | None], None]:
    """The parts of all choices as they come; None is the end of a choice."""
    queue: asyncio.Queue[tuple[Choice, Part | BltError | None]] = asyncio.Queue(2 * len(choices))

    async def read(choice: Choice) -> None:
        try:
            async for part in choice.parts():
                await queue.put((choice, part))
            await queue.put((choice, None))
        except BltError as error:
            await queue.put((choice, error))

    tasks = [asyncio.create_task(read(choice)) for choice in choices]
    try:
        left = len(choices)
        while left:
            choice, part = await queue.get()
            if isinstance(part, BltError):
                raise part
            left -= part is None
            yield choice, part
    finally:
        for task in tasks:
            task.cancel()
