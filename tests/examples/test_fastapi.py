"""runtime/examples/fastapi_app.py: the bytes of a stream, errors in one line, and clients that disconnect."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import uvicorn

from blt_runtime import Model, Request, Scheduler
from blt_runtime.engine.batch import Batch
from tests.runtime.server.clients import CAPACITY, null_model
from tests.runtime.server.servers import eventually


@pytest.fixture
def example(repo: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with a model of the null backend in place of the bundle."""
    spec = importlib.util.spec_from_file_location("fastapi_app", repo / "runtime/examples/fastapi_app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    opened: list[str] = []

    def open(path: str, *, provider: str, batched: bool) -> Model:
        assert batched
        opened.append(path)
        return null_model()

    monkeypatch.setenv("BLT_BUNDLE", "the-bundle")
    monkeypatch.setattr(Model, "open", open)
    module.opened = opened  # type: ignore[attr-defined]
    return module


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that the application has made."""
    made: list[Request] = []
    plain = Scheduler.submit

    def submit(self: Scheduler, *arguments: Any, **keywords: Any) -> Request:
        made.append(plain(self, *arguments, **keywords))
        return made[-1]

    monkeypatch.setattr(Scheduler, "submit", submit)
    return made


def streamed(n: int, seed: int) -> bytes:
    """What a stream generates after the same prompt."""
    stream = null_model().stream()
    stream.append("Once")
    return b"".join(stream.generate(n, temperature=0.8, seed=seed))


def within(example: ModuleType, use: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    """Uses a client of the started application, without a network."""

    async def run() -> None:
        async with (
            example.app.router.lifespan_context(example.app),
            httpx.AsyncClient(transport=httpx.ASGITransport(example.app), base_url="http://test") as client,
        ):
            await use(client)

    asyncio.run(run())


def test_many_answers_are_those_of_streams(example: ModuleType) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        asked = [client.post("/generate", json={"prompt": "Once", "n": 50, "seed": seed}) for seed in range(20)]
        answers = await asyncio.gather(*asked)
        assert [answer.content for answer in answers] == [streamed(50, seed) for seed in range(20)]
        assert answers[0].headers["content-type"] == "text/plain; charset=utf-8"

    within(example, use)
    assert example.opened == ["the-bundle"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"prompt": "Once", "n": CAPACITY}, 400, "exceed"),
        ({"prompt": "Once", "temperature": -1}, 400, "temperature"),
        ({"n": 5}, 422, "prompt"),
    ],
)
def test_what_cannot_run_is_refused(example: ModuleType, body: dict[str, Any], status: int, words: str) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        answer = await client.post("/generate", json=body)
        assert answer.status_code == status
        assert words in answer.text

    within(example, use)


def test_a_full_queue_is_503(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Scheduler.__init__
    monkeypatch.setattr(Scheduler, "__init__", lambda self, model, **_: plain(self, model, streams=1, waiting=0))
    slow_down(monkeypatch)

    async def use(client: httpx.AsyncClient) -> None:
        asked = [client.post("/generate", json={"prompt": "Once", "n": 50}) for _ in range(3)]
        assert sorted([answer.status_code for answer in await asyncio.gather(*asked)])[-1] == 503

    within(example, use)


def slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round takes 10 ms, so the longest request takes 3 s."""
    plain = Batch.round

    def slow(self: Batch) -> Any:
        time.sleep(0.01)
        return plain(self)

    monkeypatch.setattr(Batch, "round", slow)


@pytest.fixture
def url(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a real server of the application."""
    slow_down(monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = uvicorn.Server(uvicorn.Config(example.app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_a_client_that_disconnects_cancels_its_request_only(url: str, submitted: list[Request]) -> None:
    with (
        httpx.stream("POST", f"{url}/generate", json={"prompt": "Once", "n": 60, "seed": 1}) as stays,
        httpx.stream("POST", f"{url}/generate", json={"prompt": "Once", "n": CAPACITY - 10}) as leaves,
    ):
        assert next(leaves.iter_bytes())
        leaves.close()
        rest = b"".join(stays.iter_bytes())
    eventually(lambda: submitted[1].finish is not None)
    assert [request.finish for request in submitted] == ["length", "cancelled"]
    assert rest == streamed(60, seed=1)
