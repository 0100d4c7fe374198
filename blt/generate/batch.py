"""Many prompts through a scheduler: records come out in the order of the lines, whatever order they end in."""

from __future__ import annotations

import base64
import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from blt.generate.prompts import Defaults, Line, Prompt, id_of, parse, prompt_of
from blt_runtime import Request, Scheduler
from blt_runtime.errors import BltError, CapacityError, InputError, UsageError

AHEAD = 8
"""Lines in flight for each stream: so many others may end while the oldest is generated."""
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that `json` leaves as they are, and that end a line for some readers or have no UTF-8."""


@dataclass(frozen=True)
class Record:
    """The result of a line. content: a line of JSON. size: bytes of the line in the input. new_bytes: generated."""

    content: bytes
    size: int
    failed: bool
    new_bytes: int = 0


@dataclass
class _Pending:
    index: int
    size: int
    id: str | int | float | None = None
    prompt: Prompt | None = None
    request: Request | None = None
    error: BltError | None = None

    @property
    def ended(self) -> bool:
        return self.request is None or self.request.finish is not None


def window(streams: int) -> int:
    """Lines that are in flight at most: the number that `Scheduler(waiting=...)` must hold."""
    return AHEAD * streams


def run(
    scheduler: Scheduler, lines: Iterator[Line], defaults: Defaults, *, most: int, first: int = 0
) -> Iterator[Record]:
    """The records of `lines`, in their order. first: the index of the first line. most: lines in flight.

    A line with a mistake, or that does not fit the model, gives a record with its error. Other errors are raised.
    """
    pending: deque[_Pending] = deque()
    for index, line in enumerate(lines, first):
        pending.append(_submit(scheduler, line, index, defaults))
        while pending and (pending[0].ended or len(pending) >= most):
            yield _finish(pending.popleft())
    while pending:
        yield _finish(pending.popleft())


def _submit(scheduler: Scheduler, line: Line, index: int, defaults: Defaults) -> _Pending:
    made = _Pending(index, line.size)
    try:
        record = parse(line)
        made.id = id_of(record)
        made.prompt = prompt_of(record, index, defaults)
    except (UsageError, InputError) as error:
        made.error = error
        return made
    try:
        made.request = scheduler.submit(made.prompt.text, made.prompt.n, options=made.prompt.options)
    except CapacityError as error:
        made.error = error
    return made


def _finish(pending: _Pending) -> Record:
    """Waits for the end of a request."""
    data, finish = b"", None
    if pending.request is not None:
        try:
            data, finish = pending.request.result(), pending.request.finish
        except (CapacityError, InputError) as error:  # too many patches, or a grammar that allows no byte
            pending.error = error
    names = {"index": pending.index} | ({} if pending.id is None else {"id": pending.id})
    if pending.error is not None:
        return Record(_json({**names, "error": str(pending.error)}), pending.size, failed=True)
    assert pending.prompt is not None
    record = {
        **names,
        **_text(data),
        "finish_reason": "length" if finish == "length" else "stop",
        "prompt_bytes": len(pending.prompt.text),
        "new_bytes": len(data),
        "seed": pending.prompt.options.seed,
    }
    return Record(_json(record), pending.size, failed=False, new_bytes=len(data))


def _text(data: bytes) -> dict[str, str]:
    try:
        return {"text": data.decode()}
    except UnicodeDecodeError:
        return {"text": data.decode(errors="replace"), "base64": base64.b64encode(data).decode()}


def _json(record: dict[str, Any]) -> bytes:
    text = _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(record, ensure_ascii=False))
    return text.encode() + b"\n"
