"""The OpenAPI 3.1 document of the server, made from the models of requests and answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from . import answer_models as answers
from .answers import Json
from .page import FILES, TYPES
from .schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

ERRORS = {
    400: "The body, a field or a value is wrong, or prompt and answer do not fit.",
    401: "No valid API key.",
    404: "The model does not exist.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not announced as application/json.",
    429: "The queue of requests, or of grammars, is full.",
    500: "The server failed: see its log.",
    503: "The deadline passed, the server is shutting down, or there is no memory.",
}
OF_BODIES = (400, 404, 408, 413, 415)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A method of an address. body: of the request. answer: of status 200, a model or a type of text; None is an empty
    body. events: of a stream. errors: statuses beside 401 and 500. unready: 503 has an empty body. open: it needs no
    key."""

    summary: str
    body: type[BaseModel] | None = None
    answer: type[BaseModel] | str | None = None
    events: type[BaseModel] | None = None
    errors: tuple[int, ...] = ()
    unready: bool = False
    open: bool = False


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("/v1/completions", "post"): Operation(
        summary="Text that continues a prompt",
        body=CompletionRequest,
        answer=answers.Completion,
        events=answers.CompletionEvent,
        errors=(*OF_BODIES, 429, 503),
    ),
    ("/v1/chat/completions", "post"): Operation(
        summary="The next message of a chat",
        body=ChatRequest,
        answer=answers.Chat,
        events=answers.ChatEvent,
        errors=(*OF_BODIES, 429, 503),
    ),
    ("/v1/models", "get"): Operation(summary="The models, of which there is one", answer=answers.Models),
    ("/v1/models/{name}", "get"): Operation(summary="One model", answer=answers.ModelCard, errors=(404,)),
    ("/tokenize", "post"): Operation(
        summary="The ids of a prompt or of a chat",
        body=TokenizeRequest,
        answer=answers.Tokenized,
        errors=(*OF_BODIES, 503),
    ),
    ("/detokenize", "post"): Operation(
        summary="The text of ids", body=DetokenizeRequest, answer=answers.Detokenized, errors=OF_BODIES
    ),
    ("/tokenizer_info", "get"): Operation(
        summary="Names of the special ids, the chat template", answer=answers.TokenizerInfo
    ),
    ("/health", "get"): Operation(summary="Whether the process can answer", unready=True, open=True),
    ("/ready", "get"): Operation(summary="Whether new requests are accepted", unready=True, open=True),
    ("/version", "get"): Operation(summary="The version of the server", answer=answers.Version, open=True),
    ("/metrics", "get"): Operation(summary="Metrics for Prometheus", answer="text/plain", open=True),
    ("/openapi.json", "get"): Operation(summary="This document", answer="application/json", open=True),
} | {
    ("/" if name == "index.html" else f"/{name}", "get"): Operation(
        summary=f"The page: {name}", answer=TYPES[name.rpartition(".")[2]].partition(";")[0], open=True
    )
    for name in FILES
}


def document(version: str, keys: bool) -> Json:
    """The document. keys: whether the server demands API keys."""
    paths: dict[str, Json] = {}
    for (path, method), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method] = _operation(path, method, operation, keys)
    components: Json = {"schemas": _schemas()}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "blt serve", "version": version},
        "paths": paths,
        "components": components,
    }


def _schemas() -> Json:
    found: list[type[BaseModel]] = [answers.Error]
    for operation in OPERATIONS.values():
        found += [each for each in (operation.body, operation.answer, operation.events) if isinstance(each, type)]
    named = list(dict.fromkeys(found))
    _, made = models_json_schema([(each, "validation") for each in named], ref_template=_PLACE + "{model}")
    schemas: Json = made["$defs"]
    return schemas


_PLACE = "#/components/schemas/"


def _reference(model: type[BaseModel]) -> Json:
    return {"$ref": _PLACE + model.__name__}


def _operation(path: str, method: str, operation: Operation, keys: bool) -> Json:
    guarded = keys and not operation.open
    statuses = sorted({*operation.errors, 500, *([401] if guarded else [])})
    found: Json = {"summary": operation.summary, "operationId": _name(path, method)}
    if "{name}" in path:
        found["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if operation.body is not None:
        content = {"application/json": {"schema": _reference(operation.body)}}
        found["requestBody"] = {"required": True, "content": content}
    if guarded:
        found["security"] = [{"key": []}]
    found["responses"] = {"200": _answer(operation)} | {str(status): _error(status) for status in statuses}
    if operation.unready:
        found["responses"]["503"] = {"description": "It is not so."}
    return found


def _name(path: str, method: str) -> str:
    words = path.replace("{", "").replace("}", "").replace(".", "/").split("/")
    return "_".join([method, *(word for word in words if word)])


def _answer(operation: Operation) -> Json:
    content: dict[str, Any] = {}
    if isinstance(operation.answer, str):
        is_json = operation.answer == "application/json"
        content[operation.answer] = {"schema": {"type": "object" if is_json else "string"}}
    elif operation.answer is not None:
        content["application/json"] = {"schema": _reference(operation.answer)}
    if operation.events is not None:
        text = f"With stream: true. Each line `data: ...` holds a {operation.events.__name__} or an Error, the last one"
        schema = {"description": f"{text} [DONE]."}  # without a type: tools disagree on what a stream of events is
        content["text/event-stream"] = {"schema": schema, "x-event-schema": _reference(operation.events)}
    return {"description": operation.summary} | ({"content": content} if content else {})


def _error(status: int) -> Json:
    content = {"application/json": {"schema": _reference(answers.Error)}}
    found: Json = {"description": ERRORS[status], "content": content}
    if status in (429, 503):
        wait = {"description": "Seconds until another try.", "schema": {"type": "integer", "minimum": 0}}
        found["headers"] = {"Retry-After": wait}
    return found
