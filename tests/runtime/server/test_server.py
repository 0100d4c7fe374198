"""A real server on a socket: real clients, clients that go away, and an orderly end. A round takes 5 ms."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

from tests.runtime.server.clients import error_of, events_of
from tests.runtime.server.servers import eventually, idle, metric, served


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served() as (found, _):
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def asked(n: int = 250, **more: Any) -> dict[str, Any]:
    return {"prompt": "abc", "max_tokens": n, "ignore_eos": True, "stream": True} | more


def streamed(url: str, n: int = 250) -> contextlib.AbstractContextManager[httpx.Response]:
    return httpx.stream("POST", f"{url}/v1/completions", json=asked(n), timeout=60)


def test_openais_client_completes(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    options: Any = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "seed": 1, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**options, logprobs=2)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    assert whole.choices[0].logprobs is not None
    events = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].text for event in events if event.choices) == whole.choices[0].text
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 8


def test_openais_client_chats(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    options: Any = {"model": "tiny", "messages": messages, "max_tokens": 8, "seed": 1}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2).choices[0]
    events = list(client.chat.completions.create(**options, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == whole.message.content
    assert whole.logprobs is not None
    assert whole.logprobs.content


class Person(pydantic.BaseModel):
    name: Literal["Ada", "Bob"]
    old: bool


def test_openais_client_parses_a_constrained_answer(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Who?"}]
    answer = client.chat.completions.parse(model="tiny", messages=messages, response_format=Person, max_tokens=80)
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_openais_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="abc")
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        client.completions.create(model="tiny", prompt="abc", presence_penalty=1.0)
    with pytest.raises(openai.BadRequestError, match="exceed"):
        client.completions.create(model="tiny", prompt="abc", max_tokens=10_000)


def test_a_client_that_leaves_a_stream_frees_its_row(url: str) -> None:
    before = metric(url, "vllm:generation_tokens_total")
    with streamed(url) as response:
        next(response.iter_raw())
    eventually(lambda: idle(url))
    assert metric(url, "vllm:generation_tokens_total") - before < 250


def test_a_client_that_leaves_before_the_answer_frees_its_row(url: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=asked(stream=False), timeout=0.2)
    eventually(lambda: idle(url))


def test_a_full_queue_is_429_with_a_time_to_retry(url: str) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(streamed(url))
        refused = httpx.post(f"{url}/v1/completions", json=asked())
        assert error_of(refused, 429)["code"] == "queue_full"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
    eventually(lambda: idle(url))
    assert httpx.post(f"{url}/v1/completions", json=asked(2)).status_code == 200


def test_several_prompts_are_admitted_together_or_not_at_all(url: str) -> None:
    refused = httpx.post(f"{url}/v1/completions", json=asked(prompt=["a"] * 4))
    error_of(refused, 429)
    eventually(lambda: idle(url))


def test_sigterm_lets_running_requests_end() -> None:
    with served() as (url, process), streamed(url, 100) as response:
        process.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"{url}/ready").status_code == 503)
        assert error_of(httpx.post(f"{url}/v1/completions", json=asked()), 503)["code"] == "shutting_down"
        assert httpx.get(f"{url}/health").status_code == 200
        events = events_of(response.read().decode())
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(60) == 143


def test_the_drain_has_a_limit() -> None:
    with served(drain=0.1) as (url, process), streamed(url) as response:
        process.send_signal(signal.SIGTERM)
        events = events_of(response.read().decode())
        assert events[-1]["error"]["code"] == "shutting_down"
        assert process.wait(60) == 143
