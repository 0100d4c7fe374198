"""Requests to an application in this process, on the null backend."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
from starlette.applications import Starlette

from blt_runtime import Model
from blt_runtime.backends.null import null_spec
from tests.runtime.streams import model_of

Json = dict[str, Any]
CAPACITY = 300


def null_model() -> Model:
    return model_of(null_spec(local_kind="window", capacity_bytes=CAPACITY, capacity_patches=CAPACITY))


class Client:
    """Calls an application without a network."""

    def __init__(self, app: Starlette) -> None:
        self.app = app

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(call())

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.send("GET", path, headers=headers)

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        return self.send("POST", path, json=body, headers=headers)

    def ok(self, path: str, **body: Any) -> Json:
        """The answer to a request that must succeed."""
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        found = response.json()
        assert isinstance(found, dict)
        return found

    def error(self, path: str, status: int, body: object) -> Json:
        """The one error of a request that must fail."""
        return error_of(self.post(path, body), status)

    def events(self, path: str, **body: Any) -> list[Json]:
        """The events of a stream that must end with [DONE]."""
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return events_of(response.text)


def error_of(response: httpx.Response, status: int) -> Json:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    found: Json = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert "\n" not in found["message"]
    return found


def events_of(text: str) -> list[Json]:
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def text_of(events: list[Json], index: int = 0) -> str:
    """The text of one choice of a stream of completions."""
    return "".join(c["text"] for event in events for c in event["choices"] if c["index"] == index)
