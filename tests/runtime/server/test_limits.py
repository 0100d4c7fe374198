"""Limits: keys, bodies, deadlines; and everything beside generation."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from blt_runtime.engine.batch import Batch, Row
from blt_runtime.errors import UsageError
from blt_runtime.server import Settings, create_app
from tests.runtime.server.clients import CAPACITY, Client, error_of, null_model

COMPLETIONS = "/v1/completions"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Batch.round

    def later(batch: Batch) -> list[Row]:
        time.sleep(0.005)
        return plain(batch)

    monkeypatch.setattr(Batch, "round", later)


def made(settings: Settings) -> Iterator[Client]:
    app = create_app(null_model(), settings)
    yield Client(app)
    app.state.service.scheduler.close()


@pytest.fixture
def guarded() -> Iterator[Client]:
    yield from made(Settings(name="tiny", api_keys=("first", "second"), max_body=1000))


@pytest.mark.parametrize("key", [None, "third", "firs", "first ", "Basic first", ""])
def test_a_wrong_key_is_401(guarded: Client, key: str | None) -> None:
    header = {} if key is None else {"Authorization": key if " " in key.strip() else f"Bearer {key}x".strip()}
    for path in (COMPLETIONS, "/v1/chat/completions", "/tokenize", "/detokenize"):
        response = guarded.post(path, {}, **header)
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert guarded.get("/v1/models", **header).status_code == 401


@pytest.mark.parametrize("key", ["first", "second"])
def test_each_key_lets_in(guarded: Client, key: str) -> None:
    assert guarded.post(COMPLETIONS, {"prompt": "a"}, Authorization=f"Bearer {key}").status_code == 200


def test_the_state_of_the_server_needs_no_key(guarded: Client) -> None:
    assert [guarded.get(path).status_code for path in ("/health", "/ready", "/metrics", "/version")] == [200] * 4


def test_a_body_over_the_limit_is_413(guarded: Client) -> None:
    response = guarded.post(COMPLETIONS, {"prompt": "a" * 1000}, Authorization="Bearer first")
    assert error_of(response, 413)["code"] == "body_too_large"


def test_a_body_must_be_announced_as_json(client: Client) -> None:
    response = client.send("POST", COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    error_of(response, 415)


@pytest.mark.usefixtures("slow")
def test_a_deadline_ends_a_request() -> None:
    for client in made(Settings(name="tiny", deadline=0.05)):
        found = client.error(COMPLETIONS, 503, {"prompt": "a", "max_tokens": 250, "ignore_eos": True})
        assert found["code"] == "deadline_exceeded"
        events = client.events(COMPLETIONS, prompt="a", max_tokens=250, ignore_eos=True)
        assert events[-1]["error"]["code"] == "deadline_exceeded"
        assert "choices" in events[0]


def test_models(client: Client) -> None:
    card = client.get("/v1/models").json()["data"][0]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", CAPACITY)
    assert client.get("/v1/models/tiny").json() == card
    assert error_of(client.get("/v1/models/a/b"), 404)["code"] == "model_not_found"
    assert client.error(COMPLETIONS, 404, {"model": "other", "prompt": "a"})["param"] == "model"


def test_as_much_as_fits_is_generated(client: Client) -> None:
    messages = [{"role": "user", "content": "hi"}]
    usage = client.ok("/v1/chat/completions", messages=messages, ignore_eos=True, temperature=0)["usage"]
    assert usage["total_tokens"] <= CAPACITY
    exact = client.ok(COMPLETIONS, prompt="abc", max_tokens=CAPACITY - 3, ignore_eos=True)["usage"]
    assert exact["total_tokens"] == CAPACITY
    found = client.error(COMPLETIONS, 400, {"prompt": "abc", "max_tokens": CAPACITY - 2})
    assert found["code"] == "context_length_exceeded"


def test_text_becomes_ids_and_back(client: Client) -> None:
    ids = client.ok("/tokenize", prompt="é<|eos|>")
    assert ids["tokens"][:2] == [0xC3 + 4, 0xA9 + 4]
    assert ids["count"] == len(ids["tokens"]) == 9
    assert client.ok("/detokenize", tokens=ids["tokens"]) == {"prompt": "é<|eos|>"}
    assert client.ok("/tokenize", prompt="é", add_special_tokens=True)["tokens"] == [1, 0xC3 + 4, 0xA9 + 4]
    named = client.ok("/tokenize", prompt="é", return_token_strs=True)["token_strs"]
    assert named == ["bytes:\\xc3", "bytes:\\xa9"]


@pytest.mark.parametrize(("text", "id"), [("<|boe|>", 0), ("<|bos|>", 1), ("<|eos|>", 2), ("<|bpe|>", 3)])
def test_the_name_of_a_special_id_alone_is_that_id(client: Client, text: str, id: int) -> None:
    assert client.ok("/tokenize", prompt=text, add_special_tokens=True)["tokens"] == [id]


def test_tokenizer_info_names_the_special_ids(client: Client) -> None:
    found = client.get("/tokenizer_info").json()
    assert (found["bos_token"], found["eos_token"]) == ("<|bos|>", "<|eos|>")


def test_unknown_addresses_and_methods_are_json_errors(client: Client) -> None:
    error_of(client.get("/v2/models"), 404)
    error_of(client.get(COMPLETIONS), 405)


def test_a_request_id_is_returned(client: Client) -> None:
    assert client.get("/health", **{"x-request-id": "abc"}).headers["x-request-id"] == "abc"
    assert len(client.get("/health", **{"x-request-id": "x" * 100}).headers["x-request-id"]) == 32


def test_metrics_have_vllms_names(client: Client) -> None:
    client.ok(COMPLETIONS, prompt="abc", max_tokens=20, ignore_eos=True)
    text = client.get("/metrics").text
    names = (
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_sum", "vllm:e2e_request_latency_seconds_count",
        "vllm:request_queue_time_seconds_sum", "blt:bytes_per_patch", "blt:patches_per_latent_call",
    )  # fmt: skip
    for name in names:
        assert f'{name}{{engine="0",' in text, name
    assert 'vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"}' in text


@pytest.mark.parametrize(
    "settings",
    [
        {"name": ""},
        {"streams": 0},
        {"deadline": 0.0},
        {"api_keys": ("",)},
        {"api_keys": ("é",)},
        {"isolate_keys": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Settings(**settings)  # type: ignore[arg-type]
