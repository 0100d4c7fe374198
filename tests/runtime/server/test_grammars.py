"""Constrained answers: JSON schemas, regular expressions and Lark grammars in requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jsonschema
import pytest

from blt_runtime.grammar import Grammar
from blt_runtime.server import Settings, create_app, grammars
from tests.runtime.server.clients import Client, Json, error_of, null_model

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
LARK = 'start: "yes" | "no"'
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Who?"}]


def text_of(answer: Json) -> str:
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


def test_a_completion_matches_its_schema(client: Client) -> None:
    for seed in range(4):
        answer = client.ok(COMPLETION, prompt="x", max_tokens=200, seed=seed, response_format=FORMAT)
        jsonschema.validate(json.loads(text_of(answer)), SCHEMA)


def test_a_chat_matches_its_schema_whatever_ends_its_free_answers(client: Client) -> None:
    answer = client.ok(CHAT, messages=MESSAGES, max_tokens=200, response_format=FORMAT)
    jsonschema.validate(json.loads(text_of(answer)), SCHEMA)


def test_any_json_object(client: Client) -> None:
    answer = client.ok(CHAT, messages=MESSAGES, seed=1, response_format={"type": "json_object"}, max_tokens=100)
    assert answer["choices"][0]["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [("regex", "[a-f]{3,9}!", "[a-f]{3,9}!"), ("grammar", LARK, "yes|no")],
    ids=["regex", "lark"],
)
def test_regular_expressions_and_lark(client: Client, field: str, value: str, wanted: str) -> None:
    assert re.fullmatch(wanted, text_of(client.ok(COMPLETION, prompt="x", max_tokens=30, **{field: value})))


def test_the_text_is_that_of_a_stream(client: Client) -> None:
    stream = client.app.state.service.model.stream()
    stream.append("The ")
    want = b"".join(stream.generate(100, temperature=0.7, seed=3, grammar=Grammar(schema=SCHEMA))).decode()
    body = {"prompt": "The ", "max_tokens": 100, "temperature": 0.7, "seed": 3, "response_format": FORMAT}
    assert text_of(client.ok(COMPLETION, **body)) == want
    assert "".join(event["choices"][0]["text"] for event in client.events(COMPLETION, **body)) == want


def test_each_choice_has_a_text_of_its_own(client: Client) -> None:
    answer = client.ok(COMPLETION, prompt=["a", "b"], n=2, seed=5, max_tokens=100, response_format=FORMAT)
    for choice in answer["choices"]:
        jsonschema.validate(json.loads(choice["text"]), SCHEMA)


def test_logprobs_of_constrained_answers(client: Client) -> None:
    answer = client.ok(COMPLETION, prompt="x", regex="[ab]{4}", max_tokens=9, logprobs=2)
    found = answer["choices"][0]["logprobs"]
    assert "".join(found["tokens"]) == answer["choices"][0]["text"]
    assert all(token in top for token, top in zip(found["tokens"], found["top_logprobs"], strict=True))


def test_a_limit_ends_a_text_with_a_prefix(client: Client) -> None:
    answer = client.ok(COMPLETION, prompt="x", max_tokens=4, regex="[a-f]{9}")
    assert re.fullmatch("[a-f]{4}", answer["choices"][0]["text"])
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_grammar_is_compiled_once(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def counted(**source: str) -> Grammar:
        made.extend(source.values())
        return Grammar(**source)  # type: ignore[arg-type]

    monkeypatch.setattr(grammars, "Grammar", counted)
    body = {"prompt": "x", "max_tokens": 20, "regex": "once(,once){2}"}

    async def ask() -> list[httpx.Response]:
        async with requests_to(client) as many:
            return await asyncio.gather(*(many.post(COMPLETION, json=body) for _ in range(8)))

    assert [text_of(answer.json()) for answer in asyncio.run(ask())] == ["once,once,once"] * 8
    assert made == ["once(,once){2}"]


@contextlib.asynccontextmanager
async def requests_to(client: Client) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(client.app), base_url="http://test") as many:
        yield many


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Grammars are compiled once this is set."""
    event = threading.Event()

    def later(**source: str) -> Grammar:
        event.wait()
        return Grammar(**source)  # type: ignore[arg-type]

    monkeypatch.setattr(grammars, "Grammar", later)
    return event


def test_too_many_grammars_are_429_and_hold_up_no_other_request(
    client: Client, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.app.state.service.grammars._made.clear()
    monkeypatch.setattr(grammars, "MOST_OPEN", 3)

    async def ask() -> list[httpx.Response]:
        async with requests_to(client) as many:

            async def of(**body: Any) -> httpx.Response:
                return await many.post(COMPLETION, json={"prompt": "x", "max_tokens": 9, **body})

            waiting = [asyncio.create_task(of(regex=text)) for text in ("aa", "bb", "cc", "aa")]
            await asyncio.sleep(0)
            refused = await of(regex="dd")
            free = await of()
            assert not any(task.done() for task in waiting)
            held.set()
            return [refused, free, await of(regex="aa"), *[await task for task in waiting]]

    refused, free, *constrained = asyncio.run(ask())
    assert error_of(refused, 429)["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) == 3
    assert free.status_code == 200
    assert [text_of(answer.json()) for answer in constrained] == ["aa", "aa", "bb", "cc", "aa"]


def test_the_deadline_holds_while_a_grammar_compiles(held: threading.Event) -> None:
    app = create_app(null_model(), Settings(name="tiny", deadline=0.05))
    client, body = Client(app), {"prompt": "x", "regex": "late"}
    assert client.error(COMPLETION, 503, body)["code"] == "deadline_exceeded"
    held.set()
    app.state.service.grammars._made["regex", "late"].result()  # no request waits for it, and it is kept
    app.state.service.scheduler.close()


def of_schema(schema: Json) -> Json:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


REFUSED: dict[str, tuple[Json, str, str]] = {
    "open bracket": ({"regex": "a("}, "regex", "cannot be used"),
    "look-ahead": ({"regex": "(?=a)b"}, "regex", "cannot be used"),
    "missing rule": ({"grammar": "start: missing"}, "grammar", "cannot be used"),
    "empty": ({"grammar": ""}, "grammar", "cannot be used"),
    "two": ({"regex": "a", "grammar": LARK}, "grammar", "one of them"),
    "no end": ({"regex": "a", "ignore_eos": True}, "ignore_eos", "ends where its regex does"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
    "wrong schema": (of_schema({"type": 7}), "response_format", "cannot be used"),
    "remote schema": (of_schema({"$ref": "http://a/b"}), "response_format", "cannot be used"),
    "impossible schema": (of_schema({"enum": []}), "response_format", "cannot be used"),
    "unknown type": ({"response_format": {"type": "yaml"}}, "response_format.type", "json_schema"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_grammar_that_cannot_be_used_is_one_error(client: Client, name: str) -> None:
    body, param, message = REFUSED[name]
    error = client.error(COMPLETION, 400, {"prompt": "x", **body})
    assert error["param"] == param
    assert message in error["message"]
    kept = {text for _, text in client.app.state.service.grammars._made}
    assert not kept & {body.get("regex"), body.get("grammar")} - {"a", LARK}


def test_a_server_without_the_library_names_the_extra(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = client.error(COMPLETION, 400, {"prompt": "x", "regex": "never before"})
    assert error["param"] == "regex"
    assert "pip install 'blt-runtime[grammar]'" in error["message"]


def test_old_grammars_are_forgotten(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "KEPT", 2)
    for digit in range(4):
        client.ok(COMPLETION, prompt="x", max_tokens=5, regex=f"{digit}")
    assert [text for _, text in client.app.state.service.grammars._made] == ["2", "3"]
