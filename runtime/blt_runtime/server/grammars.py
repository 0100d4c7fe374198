"""What an answer must match: the grammars of requests, compiled once and away from the event loop."""

from __future__ import annotations

import asyncio
import json
import math
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ..errors import InputError, MissingExtra, UsageError
from ..grammar import Grammar
from ..grammar_compiler import TRIAL_SECONDS
from .errors import RequestError, shutting_down
from .schema import Generation, ResponseFormat

KEPT = 64
"""Compiled grammars that later requests may use again."""
AT_ONCE = 2
"""Grammars that compile at a time, each in a process with limits of its own."""
MOST_OPEN = 34
"""Grammars that compile or wait for it before another one is refused."""
Key = tuple[str, str]
"""An argument of `Grammar`, and its value."""


class Grammars:
    """Compiled grammars by their source. Requests with the same one share it; the first compiles it."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(AT_ONCE, "grammar")
        self._made: OrderedDict[Key, Future[Grammar]] = OrderedDict()
        self._open = set[Future[Grammar]]()

    async def of(self, body: Generation) -> Grammar | None:
        """What the answer must match; None if it is free. Raises RequestError, which names the field."""
        given = constraints(body)
        fields = list(given)
        if not fields:
            return None
        if len(fields) > 1:
            raise RequestError(f"{fields[0]} and {fields[1]}: an answer matches one of them", param=fields[1])
        if body.ignore_eos:
            raise RequestError(f"ignore_eos: an answer ends where its {fields[0]} does", param="ignore_eos")
        try:
            # Other requests may wait for the same grammar, so one that goes away does not cancel it.
            return await asyncio.shield(asyncio.wrap_future(self._compile(given[fields[0]])))
        except (UsageError, InputError, MissingExtra) as error:
            raise RequestError(f"{fields[0]}: {error}", param=fields[0]) from error

    def _compile(self, key: Key) -> Future[Grammar]:
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key]
        if len(self._open) >= MOST_OPEN:
            seconds = math.ceil(len(self._open) * TRIAL_SECONDS / AT_ONCE)
            message = f"{len(self._open)} grammars are compiled or wait for it: try again in {seconds} s"
            raise RequestError(message, status=429, code="queue_full", retry_after=seconds)
        argument, text = key
        try:
            made = self._threads.submit(lambda: Grammar(**{argument: text}))  # type: ignore[arg-type]
        except RuntimeError as error:  # after `close`
            raise shutting_down() from error
        self._made[key] = made
        self._open.add(made)
        made.add_done_callback(lambda done: self._ended(key, done))
        while len(self._made) > KEPT:
            self._made.popitem(last=False)
        return made

    def _ended(self, key: Key, made: Future[Grammar]) -> None:
        self._open.discard(made)
        if made.cancelled() or made.exception():
            self._made.pop(key, None)

    def close(self) -> None:
        """Ends the threads; a compilation that has begun is waited for by nobody."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def constraints(body: Generation) -> dict[str, Key]:
    """The fields that say what the answer must match. Raises RequestError."""
    given = {
        "response_format": _schema_of(body.response_format),
        "regex": None if body.regex is None else ("regex", body.regex),
        "grammar": None if body.grammar is None else ("lark", body.grammar),
    }
    return {name: key for name, key in given.items() if key is not None}


def _schema_of(wanted: ResponseFormat | None) -> Key | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return "schema", '{"type": "object"}'
    if wanted.json_schema is None:
        raise RequestError("response_format: json_schema is missing", param="response_format.json_schema")
    return "schema", _json(wanted.json_schema.schema_)


def _json(schema: dict[str, Any]) -> str:
    """The schema as text, in the order of its keys: it is the order of the answer's."""
    try:
        return json.dumps(schema, ensure_ascii=False)
    except RecursionError:
        raise RequestError("response_format: the schema is nested too deeply", param="response_format") from None
