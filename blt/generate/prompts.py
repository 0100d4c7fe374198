"""The lines of a JSONL file as prompts: one object per line, with its own options where it has them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from blt.generate.chat_format import PLAIN, ChatFormat
from blt_runtime import GenerateOptions, reading
from blt_runtime.arguments import instance, whole
from blt_runtime.chat import Message
from blt_runtime.errors import InputError, UsageError, nearest, shown
from blt_runtime.text import listed_stops

SOURCES = ("prompt", "prompt_base64", "messages")
OPTIONS = ("temperature", "top_k", "top_p", "min_p", "stop")
KEYS = (*SOURCES, "id", "max_bytes", "n", "seed", *OPTIONS)
LONGEST = reading.LARGEST
"""Most bytes of a line."""


@dataclass(frozen=True)
class Line:
    """A line that is not blank. content: None for one of more than `LONGEST` bytes. size: its bytes in the file, and
    those of blank lines before it."""

    content: bytes | None
    size: int


@dataclass(frozen=True)
class Prompt:
    """What a line asks for. options: with its seed."""

    text: bytes
    n: int
    options: GenerateOptions


@dataclass(frozen=True)
class Defaults:
    """What counts for a line without an option of its own. seed: of all lines; see `line_seed`. format: of messages."""

    n: int
    options: GenerateOptions
    seed: int
    format: ChatFormat = PLAIN


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """The lines of a file that are not blank."""
    size = 0
    while content := file.readline(LONGEST + 1):
        size += len(content)
        long = len(content) > LONGEST
        while len(content) > LONGEST and not content.endswith(b"\n"):
            content = file.readline(LONGEST + 1)
            size += len(content)
        if long or content.strip():
            yield Line(None if long else content, size)
            size = 0


def line_seed(seed: int, index: int) -> int:
    """The seed of a line: 53 bits, which every reader of JSON keeps."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> np.uint64(11))


def parse(line: Line) -> dict[str, Any]:
    """The object in a line, without keys whose value is null. Raises InputError."""
    if line.content is None:
        raise InputError(f"the line has more than {LONGEST:,} bytes")
    try:
        record = reading.parse_json(line.content)
    except ValueError as error:
        raise InputError(f"the line is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"the line must be a JSON object, not {shown(record)}")
    return {key: value for key, value in record.items() if value is not None}


def prompt_of(record: Mapping[str, Any], index: int, defaults: Defaults) -> Prompt:
    """What an object asks for.

    Raises UsageError for an unknown key or a bad value, and InputError where the chat template refuses the messages.
    """
    for key in record:
        if key not in KEYS:
            raise UsageError(f"unknown key {shown(key)}: {nearest(key, KEYS)}")
    given = [key for key in SOURCES if key in record]
    if len(given) != 1:
        raise UsageError("a line needs exactly one of prompt, prompt_base64 and messages")
    if "n" in record and "max_bytes" in record:
        raise UsageError("n and max_bytes mean the same: leave out one of them")
    own = {key: record[key] for key in OPTIONS if key in record}
    seed = record["seed"] if "seed" in record else line_seed(defaults.seed, index)
    options = replace(defaults.options, **own, seed=whole("seed", seed))
    n = whole("n", record.get("n", record.get("max_bytes", defaults.n)), 1)
    if "messages" in record:
        options = replace(options, stop=[*listed_stops(options.stop), *defaults.format.stops])
        return Prompt(defaults.format.render(_messages(record["messages"])), n, options)
    text = _plain_text(record["prompt"]) if "prompt" in record else _decoded(record["prompt_base64"])
    return Prompt(text, n, options)


def id_of(record: Mapping[str, Any]) -> str | int | float | None:
    """The id of a line. Raises UsageError unless it is text or a number."""
    found = record.get("id")
    if isinstance(found, bool) or not isinstance(found, str | int | float | None):
        raise UsageError(f"id must be text or a number, not {shown(found)}")
    return found


def _plain_text(value: Any) -> bytes:
    instance("prompt", value, str, "text")
    return str(value).encode()


def _decoded(value: Any) -> bytes:
    instance("prompt_base64", value, str, "text in base64")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"prompt_base64 is not valid: {error}") from error


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise UsageError(f"messages must be a list of objects with role and content, not {shown(value)}")
    for message in value:
        if message.keys() != {"role", "content"} or not isinstance(message["content"], str):
            raise UsageError(
                f"a message must have a role and a text as its content, and nothing else: {shown(message)}"
            )
    return [Message(**message) for message in value]
