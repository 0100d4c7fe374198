"""Requests drawn from the server's OpenAPI document: no answer is a 5xx, and each is as the document declares.

    BLT_FUZZ_EXAMPLES=2000 python -m pytest tests/fuzz/test_requests.py      the long form: examples of each operation

The draws of the short form are the same each time. A third of the examples is drawn from the document, a third breaks
it, and a third is drawn and then changed where fields exclude each other, so that most of them are generated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from blt_runtime.server import Settings, create_app
from blt_runtime.server.openapi import OPERATIONS
from tests.runtime.server.clients import null_model

EXAMPLES = int(os.environ.get("BLT_FUZZ_EXAMPLES", "0"))
SHORT = 15
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
PATHS = ["/v1/completions", "/v1/chat/completions", "/v1/models/{name}", "/tokenize", "/detokenize"]
"""Those whose answers depend on the request."""


def accepted(case: schemathesis.Case[Any]) -> schemathesis.Case[Any]:
    """The case without what the document cannot forbid: fields that exclude each other, other models, 1.0 for 1."""
    if isinstance(case.body, dict):
        body: dict[str, Any] = {key: _whole(value) for key, value in case.body.items()}
        for key in ("model", "prompt_base64", "regex", "grammar", "response_format", "max_tokens", "stream_options"):
            body.pop(key, None)
        if "messages" not in body and "tokens" not in body:
            body["prompt"] = body.get("prompt") or "x"
        if not body.get("logprobs"):
            body.pop("top_logprobs", None)
        case.body = body | ({"max_completion_tokens": 5} if "n" in body or "echo" in body else {})
    return case


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


@pytest.fixture
def document() -> Iterator[schemathesis.BaseSchema]:
    """Of an application of its own: schemathesis shuts it down at the end of a test."""
    app = create_app(null_model(), Settings(name="tiny", streams=4, max_queue=64))
    yield schemathesis.openapi.from_asgi("/openapi.json", app)
    app.state.service.scheduler.close()


def test_every_operation_that_reads_something_is_drawn() -> None:
    assert set(PATHS) == {path for path, method in OPERATIONS if method == "post" or "{" in path}


@pytest.mark.parametrize("path", PATHS)
def test_answers_are_as_declared(document: schemathesis.BaseSchema, path: str) -> None:
    operation = document[path]["get" if "{" in path else "post"]
    drawn, broken = operation.as_strategy(), operation.as_strategy(schemathesis.GenerationMode.NEGATIVE)

    @hypothesis.settings(
        max_examples=EXAMPLES or SHORT,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=hypothesis.strategies.one_of(drawn, drawn.map(accepted), broken))
    def answers(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(checks=CHECKS)

    answers()
