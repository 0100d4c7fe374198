"""GET /openapi.json: it has every route, and answers are what it declares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from starlette.routing import Route

from blt_runtime.server import Settings, create_app
from tests.runtime.server.clients import Client, Json, events_of, null_model

CHAT: Json = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
REQUESTS: dict[str, tuple[str, Json | None]] = {
    "text": ("/v1/completions", {"prompt": ["Zoë", [70, 71]], "n": 2}),
    "logprobs": ("/v1/completions", {"prompt": "Zoë", "echo": True, "logprobs": 2, "return_patches": True}),
    "prompt alone": ("/v1/completions", {"prompt": [1, 70], "echo": True, "logprobs": 0, "max_tokens": 0}),
    "regex": ("/v1/completions", {"prompt_base64": "eA==", "regex": "[ab]{3}"}),
    "field": ("/v1/completions", {"prompt": "x", "n": 0}),
    "model": ("/v1/completions", {"prompt": "x", "model": "other"}),
    "queue": ("/v1/completions", {"prompt": ["x"] * 64, "n": 16}),
    "chat": ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "return_patches": True}),
    "plain chat": ("/v1/chat/completions", CHAT),
    "tokenize": ("/tokenize", {"prompt": "Zoë", "return_token_strs": True}),
    "tokenize chat": ("/tokenize", {"messages": CHAT["messages"]}),
    "detokenize": ("/detokenize", {"tokens": [70, 0, 259]}),
    "id": ("/detokenize", {"tokens": [260]}),
}
STATUSES = {"field": 400, "model": 404, "queue": 429, "id": 400}
STREAMED: dict[str, Json] = {
    "text": {"prompt": ["Zoë", "x"], "stream_options": {"include_usage": True}},
    "logprobs": {"prompt": "Zoë", "echo": True, "logprobs": 2, "return_patches": True},
    "chat": {**CHAT, "logprobs": True, "top_logprobs": 2, "stream_options": {"include_usage": True}},
    "plain chat": {**CHAT, "return_patches": True},
}


@pytest.fixture(scope="module")
def document(client: Client) -> Json:
    return client.get("/openapi.json").json()


@pytest.fixture
def guarded() -> Iterator[Client]:
    app = create_app(null_model(), Settings(name="tiny", api_keys=("key",), max_body=100))
    yield Client(app)
    app.state.service.scheduler.close()


def check(value: object, schema: Json, document: Json) -> None:
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def check_answer(response: httpx.Response, path: str, document: Json) -> Json:
    """Validates an answer, and returns the media type that is declared for it."""
    method = response.request.method.lower()
    declared = document["paths"][path][method]["responses"][str(response.status_code)]
    if "content" not in declared:
        assert response.content == b""
        return {}
    kind = response.headers["content-type"].partition(";")[0]
    assert kind in declared["content"]
    is_json = kind == "application/json"
    check(response.json() if is_json else response.text, declared["content"][kind]["schema"], document)
    for name, header in declared.get("headers", {}).items():
        check(int(response.headers[name]), header["schema"], document)
    found: Json = declared["content"][kind]
    return found


def test_it_has_every_route(client: Client, document: Json) -> None:
    routes = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in client.app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert {(path, method) for path, methods in document["paths"].items() for method in methods} == routes
    names = [each["operationId"] for methods in document["paths"].values() for each in methods.values()]
    assert len(set(names)) == len(names)


def test_its_schemas_are_schemas(document: Json) -> None:
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    used = set(references(document))
    assert used == {f"#/components/schemas/{name}" for name in schemas}


def references(value: Any) -> Iterator[str]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if key == "$ref":
            yield item
        yield from references(item)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_and_its_answer_are_as_declared(client: Client, document: Json, name: str) -> None:
    path, body = REQUESTS[name]
    response = client.post(path, body)
    assert response.status_code == STATUSES.get(name, 200)
    check_answer(response, path, document)
    if response.status_code in (200, 404, 429):
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        check(body, schema, document)


@pytest.mark.parametrize("name", STREAMED)
def test_events_are_as_declared(client: Client, document: Json, name: str) -> None:
    body: Json = {**STREAMED[name], "stream": True}
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    response = client.post(path, body)
    schema = check_answer(response, path, document)["x-event-schema"]
    events = events_of(response.text)
    assert len(events) > 2
    for event in events:
        check(event, schema, document)


def test_what_is_read_is_as_declared(client: Client, document: Json) -> None:
    paths = {path for path, methods in document["paths"].items() if "get" in methods}
    assert {"/", "/page.js", "/v1/models", "/health", "/ready", "/metrics", "/openapi.json"} < paths
    for path in paths:
        response = client.get(path.replace("{name}", "tiny"))
        assert response.status_code == 200
        check_answer(response, path, document)
    check_answer(client.get("/v1/models/other"), "/v1/models/{name}", document)


def test_keys_are_declared_where_they_are_needed(guarded: Client, document: Json) -> None:
    found = guarded.get("/openapi.json").json()
    assert "securitySchemes" not in document["components"]
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            response = guarded.send(method.upper(), path.replace("{name}", "tiny"), json={})
            assert (response.status_code == 401) == ("security" in operation) == ("401" in operation["responses"])
            if response.status_code == 401:
                check_answer(response, path, found)


@pytest.mark.parametrize(("status", "kind"), [(413, "application/json"), (415, "text/plain")])
def test_bodies_that_are_not_read(guarded: Client, status: int, kind: str) -> None:
    document = guarded.get("/openapi.json").json()
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        headers = {"content-type": kind, "authorization": "Bearer key"}
        response = guarded.send("POST", path, content=b" " * 200, headers=headers)
        assert response.status_code == status
        check_answer(response, path, document)
