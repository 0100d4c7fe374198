"""Bad values in every field of a request: one error that names the field, and neighbours that notice nothing.

The fields are those of the models in `server/schema.py`. A new one is tried with every value below; if some of them are
valid for it, `VALID` says so.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from blt_runtime.errors import LONGEST_MESSAGE
from blt_runtime.server.schema import LARGEST, MOST_STOPS, ChatRequest, CompletionRequest
from tests.runtime.server.clients import CAPACITY, Client, Json, error_of, events_of, text_of

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MODELS: dict[str, type[BaseModel]] = {COMPLETIONS: CompletionRequest, CHAT: ChatRequest}
BODIES: dict[str, Json] = {
    COMPLETIONS: {"prompt": "x", "max_tokens": 2},
    CHAT: {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "logprobs": True},
}
SURROUNDINGS: dict[str, Json] = {
    "stream_options": {"stream": True, "stream_options": {}},
    "response_format": {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [1]}}}},
    "messages": {"messages": [{"role": "user", "content": "x"}]},
}
"""What a field needs around it in a valid body."""
NUMBERS = {
    "-1": "-1",
    "0": "0",
    "2^31": str(1 << 31),
    "2^63": str(1 << 63),
    "1e309": "1e309",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "text": '"1"',
    "list": "[1]",
    "true": "true",
}
"""JSON texts, tried in each field that holds numbers."""
VALID: dict[str, set[str]] = {
    "temperature": {"0", "2^31", "2^63"},
    "top_k": {"-1", "0"},
    "min_p": {"0"},
    "seed": {"0", "2^31"},
    "logprobs": {"0"},
    "top_logprobs": {"0"},
    "priority": {"0"},
    "presence_penalty": {"0"},
    "frequency_penalty": {"0"},
    "min_tokens": {"0"},
    "prompt": {"text", "list"},
}
HALVES = ["\\ud800", "\\udfff", "a\\ud83dz", "\\ude00\\ud83d"]
"""Half of a surrogate pair, as a JSON text writes it."""
PLACE = "<<here>>"
Path = tuple[str | int, ...]
Case = tuple[str, str | bytes, bool, str | None]
"""A name, a body, whether it is valid, and the field that its error names."""


def fields(model: type[BaseModel]) -> Iterator[tuple[Path, Json]]:
    """Every field of a body, also those of objects in it, with its JSON schema."""
    document = model.model_json_schema()

    def walk(schema: Json, path: Path) -> Iterator[tuple[Path, Json]]:
        if "$ref" in schema:
            schema = document["$defs"][schema["$ref"].rpartition("/")[2]]
        for branch in schema.get("anyOf", ()):
            yield from walk(branch, path)
        for name, inner in schema.get("properties", {}).items():
            yield (*path, name), inner
            yield from walk(inner, (*path, name))
        if isinstance(schema.get("items"), dict) and path:
            yield from walk(schema["items"], (*path, 0))

    return walk(document, ())


def holds(schema: Json, *kinds: str) -> bool:
    """Whether a field may hold a value of one of these types of JSON."""
    types = {"integer": (int,), "number": (int, float), "string": (str,)}
    python = tuple(kind for name in kinds for kind in types[name])
    listed = [*schema.get("enum", ()), *([schema["const"]] if "const" in schema else [])]
    if any(isinstance(value, python) and not isinstance(value, bool) for value in listed):
        return True
    inner = [*schema.get("anyOf", ()), *([schema["items"]] if isinstance(schema.get("items"), dict) else [])]
    return schema.get("type") in kinds or any(holds(each, *kinds) for each in inner)


def body_with(address: str, path: Path, text: str) -> str:
    """The JSON of a body whose field `path` is `text`."""
    body = json.loads(json.dumps(BODIES[address] | SURROUNDINGS.get(str(path[0]), {})))
    at = body
    for key, following in pairwise(path):
        if isinstance(at, dict) and not isinstance(at.get(key), dict if isinstance(following, str) else list):
            at[key] = {} if isinstance(following, str) else [{"type": "text", "text": "x"}]
        at = at[key]
    at[path[-1]] = PLACE
    return json.dumps(body).replace(f'"{PLACE}"', text)


def dotted(path: Path) -> str:
    return ".".join(map(str, path))


def failures(client: Client, address: str, cases: list[Case]) -> dict[str, str]:
    """Sends bodies beside a seeded stream, and returns what is wrong with each answer; {} if nothing is."""
    body = {"prompt": "abc", "max_tokens": 100, "seed": 3, "temperature": 2.0, "ignore_eos": True}
    alone = text_of(client.events(COMPLETIONS, **body))
    found, streamed, done = dict[str, str](), list[str](), False

    async def neighbour(many: httpx.AsyncClient) -> None:
        while not (done and streamed):
            streamed.append(text_of(events_of((await many.post(COMPLETIONS, json={**body, "stream": True})).text)))
            await asyncio.sleep(0.05)

    async def send_all() -> None:
        nonlocal done
        async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://test") as many:
            task = asyncio.create_task(neighbour(many))
            for name, content, valid, param in cases:
                response = await many.post(address, content=content, headers={"content-type": "application/json"})
                if problem := problem_of(response, valid, param):
                    found[name] = problem
            done = True
            await task

    asyncio.run(send_all())
    assert set(streamed) == {alone}
    assert client.get("/health").status_code == 200
    return found


def problem_of(response: httpx.Response, valid: bool, param: str | None) -> str | None:
    if valid:
        failed = response.status_code != 200 or '"error"' in response.text
        return f"must be valid, but is {response.status_code}: {response.text[:200]}" if failed else None
    try:
        error = error_of(response, 400)
    except AssertionError:
        return f"must be refused, but is {response.status_code}: {response.text[:200]}"
    if len(error["message"]) > LONGEST_MESSAGE:
        return f"a message of {len(error['message'])} characters"
    return None if error["param"] == param else f"must name {param}: {error}"


@pytest.mark.parametrize("address", [COMPLETIONS, CHAT])
def test_numbers(client: Client, address: str) -> None:
    numeric = [path for path, schema in fields(MODELS[address]) if holds(schema, "integer", "number")]
    assert {("n",), ("temperature",), ("seed",), ("repetition_penalty",)} < set(numeric)
    cases: list[Case] = [
        (f"{dotted(path)}: {name}", body_with(address, path, text), name in VALID.get(dotted(path), ()), dotted(path))
        for path in numeric
        for name, text in NUMBERS.items()
    ]
    assert failures(client, address, cases) == {}


@pytest.mark.parametrize("address", [COMPLETIONS, CHAT])
def test_half_of_a_surrogate_pair(client: Client, address: str) -> None:
    texts = {path for path, schema in fields(MODELS[address]) if holds(schema, "string")}
    assert {("model",), ("regex",), ("stop",), ("user",), ("response_format", "json_schema", "name")} < texts
    assert {("prompt",), ("messages", 0, "content", 0, "text")} & texts
    cases: list[Case] = []
    for path in [*texts, ("metadata", "key"), ("response_format", "json_schema", "schema", "title")]:
        for half in HALVES:
            cases.append((f"{dotted(path)}: {half}", body_with(address, path, f'"{half}"'), False, dotted(path)))
        cases.append((f"{dotted(path)}: list", body_with(address, path, f'["{half}"]'), False, dotted((*path, 0))))
    assert failures(client, address, cases) == {}


def test_prompts(client: Client) -> None:
    giant, many = "x" * 1_000_000, CAPACITY + 1
    values: dict[str, tuple[Any, bool]] = {
        "empty": ("", True),
        "no ids": ([[]], True),
        "no prompts": ([], False),
        "null": (None, False),
        "giant": (giant, False),
        "too many ids": ([70] * many, False),
        "too many prompts": (["x"] * 2000, False),
        "one of several is giant": (["x", giant], False),
        "negative id": ([-1], False),
        "first id": ([0], True),
        "last id": ([259], True),
        "id out of range": ([260], False),
        "id of 64 bits": ([1 << 63], False),
        "bool": ([True], False),
        "fraction": ([70.5], False),
        "null id": ([70, None], False),
        "text among ids": ([70, "x"], False),
        "ids among texts": (["x", [70]], True),
        "three levels": ([[[70]]], False),
        "object": ({"x": 1}, False),
    }
    cases: list[Case] = [
        (name, json.dumps({"prompt": value, "max_tokens": 2}), valid, "prompt")
        for name, (value, valid) in values.items()
    ]
    for name, value in {"no base64": "x!", "short": "eA", "number": 1, "list": [1], "giant": "eHh4" * 100_000}.items():
        body = json.dumps({"prompt_base64": value, "max_tokens": 2})
        cases.append((f"prompt_base64: {name}", body, False, "prompt_base64"))
    cases.append(("both", json.dumps({"prompt": "x", "prompt_base64": "eA=="}), False, "prompt"))
    cases.append(("long answer", json.dumps({"prompt": "x", "max_tokens": LARGEST}), False, "max_tokens"))
    cases.append(("longer", json.dumps({"prompt": "x", "max_completion_tokens": 301}), False, "max_completion_tokens"))
    cases.append(("nothing", json.dumps({"prompt": "x", "max_completion_tokens": 0}), False, "max_completion_tokens"))
    assert failures(client, COMPLETIONS, cases) == {}


def test_messages(client: Client) -> None:
    values: dict[str, tuple[Any, bool, str]] = {
        "empty content": ([{"role": "user", "content": ""}], True, ""),
        "no content": ([{"role": "user"}], True, ""),
        "none": ([], False, "messages"),
        "null": (None, False, "messages"),
        "text": ("hi", False, "messages"),
        "too many": ([{"role": "user"}] * 5000, False, "messages"),
        "giant": ([{"role": "user", "content": "x" * 1_000_000}], False, "messages"),
        "no role": ([{"content": "x"}], False, "messages.0.role"),
        "unknown role": ([{"role": "robot", "content": "x"}], False, "messages.0.role"),
        "unknown field": ([{"role": "user", "contents": "x"}], False, "messages.0.contents"),
        "number": ([{"role": "user", "content": 1}], False, "messages.0.content"),
        "picture": ([{"role": "user", "content": [{"type": "image_url"}]}], False, "messages.0.content"),
        "second": ([{"role": "user"}, 1], False, "messages.1"),
    }
    cases: list[Case] = [
        (name, json.dumps({"messages": value, "max_tokens": 2}), valid, param)
        for name, (value, valid, param) in values.items()
    ]
    cases.append(("missing", "{}", False, "messages"))
    assert failures(client, CHAT, cases) == {}


EXPLODING = "start: T\nT: " + " & ".join(f"/.*w{i}.*/" for i in range(100))
GRAMMARS: dict[str, tuple[str, Any]] = {
    "open bracket": ("regex", "a("),
    "repetitions": ("regex", "(a{1000}){1000}"),
    "empty lark": ("grammar", ""),
    "missing rule": ("grammar", "start: missing"),
    "exploding": ("grammar", EXPLODING),
    "too long": ("grammar", "x" * (1 << 18)),
    "wrong type": ("response_format", {"type": 7}),
    "recursion without end": ("response_format", {"$ref": "#"}),
    "no text": ("response_format", {"allOf": [{"enum": [1]}, {"enum": [2]}]}),
    "bounds": ("response_format", {"type": "string", "minLength": 1 << 40}),
}


def test_grammars(client: Client) -> None:
    cases: list[Case] = []
    for name, (field, value) in GRAMMARS.items():
        inner = {"type": "json_schema", "json_schema": {"schema": value}} if field == "response_format" else value
        cases.append((name, json.dumps({"prompt": "x", "max_tokens": 2, field: inner}), False, field))
    assert failures(client, COMPLETIONS, cases) == {}


def test_stops(client: Client) -> None:
    values: dict[str, tuple[Any, bool]] = {
        "never in the text": (["never in the text"] * MOST_STOPS, True),
        "none": ([], True),
        "longest": ("x" * 1024, True),
        "too long": ("x" * 1025, False),
        "too many": (["x"] * (MOST_STOPS + 1), False),
        "empty": ("", False),
        "empty in a list": ([""], False),
        "number": ([1], False),
        "object": ({}, False),
    }
    cases: list[Case] = [
        (name, json.dumps({"prompt": "x", "max_tokens": 50, "ignore_eos": True, "stop": value}), valid, "stop")
        for name, (value, valid) in values.items()
    ]
    assert failures(client, COMPLETIONS, cases) == {}


@pytest.mark.parametrize("address", [COMPLETIONS, CHAT])
def test_bodies(client: Client, address: str) -> None:
    nested = {name: a * 100_000 + b * 100_000 for name, a, b in (("list", "[", "]"), ("object", '{"a":', "}"))}
    body = json.dumps(BODIES[address])
    cases: list[Case] = [
        ("nothing", "", False, None),
        ("no JSON", "{", False, None),
        ("two values", "{} {}", False, None),
        *((f"no object: {text}", text, False, None) for text in ("[]", "1", '"x"', "null", "true", "NaN")),
        ("no UTF-8", b'{"prompt": "\xff"}', False, None),
        ("UTF-16", body.encode("utf-16"), False, None),
        ("BOM", b"\xef\xbb\xbf" + body.encode(), False, None),
        ("twice", body[:-1] + ', "max_tokens": 2}', False, None),
        ("unknown field", body[:-1] + ', "max_token": 2}', False, "max_token"),
        ("empty name", body[:-1] + ', "": 2}', False, ""),
        ("half of a pair as a name", body[:-1] + ', "\\ud800": 2}', False, None),
        ("digits", body[:-1] + f', "seed": {"1" * 10_000}}}', False, "seed"),
        ("nested", nested["list"], False, None),
        ("nested objects", nested["object"], False, None),
        *(
            (f"metadata: {k}", body[:-1] + f', "metadata": {{"a": {text}}}}}', False, None)
            for k, text in nested.items()
        ),
        ("zeros", body[:-1] + ', "stop": "\\u0000"}', True, None),
    ]
    assert failures(client, address, cases) == {}


def test_bodies_over_the_limit(client: Client) -> None:
    most = client.app.state.service.settings.max_body
    error = error_of(client.post(COMPLETIONS, {"prompt": "x" * most}), 413)
    assert error["code"] == "body_too_large"
