"""POST /v1/completions: prompts, sampling, logprobs, patches and streams, against `Stream` on the same model."""

from __future__ import annotations

import base64
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from blt_runtime.ids import encode
from blt_runtime.requests import logprobs
from tests.runtime.server.clients import Client, Json, null_model, text_of

PATH = "/v1/completions"


def alone(prompt: bytes, n: int, **options: Any) -> str:
    stream = null_model().stream()
    stream.append(prompt)
    return b"".join(stream.generate(n, stop_at_eos=False, **options)).decode(errors="replace")


def complete(client: Client, prompt: object, max_tokens: int = 12, **body: Any) -> list[Json]:
    choices: list[Json] = client.ok(PATH, prompt=prompt, max_tokens=max_tokens, ignore_eos=True, **body)["choices"]
    return choices


@pytest.mark.parametrize("prompt", ["", "abc", "Zoë", "x" * 100])
def test_greedy_text_is_that_of_a_stream(client: Client, prompt: str) -> None:
    found = complete(client, prompt, temperature=0)[0]
    assert found["text"] == alone(prompt.encode(), 12, temperature=0.0)
    assert found["finish_reason"] == "length"


def test_seeded_text_is_that_of_a_stream(client: Client) -> None:
    options: Json = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 5}
    assert complete(client, "abc", **options)[0]["text"] == alone(b"abc", 12, **options)


def test_the_temperature_is_1_by_default(client: Client) -> None:
    assert complete(client, "abc", seed=3)[0]["text"] == alone(b"abc", 12, temperature=1.0, seed=3)


def test_choice_i_draws_with_seed_plus_i(client: Client) -> None:
    found = complete(client, ["abc", "de"], n=3, seed=7)
    expected = [alone(p, 12, temperature=1.0, seed=7 + i) for p in (b"abc", b"de") for i in range(3)]
    assert [choice["text"] for choice in found] == expected
    assert [choice["index"] for choice in found] == list(range(6))


def test_sixteen_bytes_are_generated_by_default(client: Client) -> None:
    found = client.ok(PATH, prompt="abc", ignore_eos=True)
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19}


def test_max_completion_tokens_counts_before_max_tokens(client: Client) -> None:
    usage = client.ok(PATH, prompt="a", max_tokens=9, max_completion_tokens=3, ignore_eos=True)["usage"]
    assert usage["completion_tokens"] == 3


def test_ids_and_base64_are_prompts_like_text(client: Client) -> None:
    expected = complete(client, "Zoë", temperature=0)[0]["text"]
    ids = encode("Zoë", bos=False).tolist()
    raw = base64.b64encode("Zoë".encode()).decode()
    for prompt in (ids, [ids], ["Zoë"], [1, *ids]):
        assert complete(client, prompt, temperature=0)[0]["text"] == expected
    assert complete(client, None, prompt_base64=raw, temperature=0)[0]["text"] == expected
    assert complete(client, None, prompt_base64=[raw], temperature=0)[0]["text"] == expected


def test_bos_is_counted_only_if_it_was_sent(client: Client) -> None:
    ids = encode("abc", bos=False).tolist()
    counts = [client.ok(PATH, prompt=p, max_tokens=1)["usage"]["prompt_tokens"] for p in ("abc", ids, [1, *ids])]
    assert counts == [3, 3, 4]


def test_a_stop_string_ends_the_text_and_is_not_in_it(client: Client) -> None:
    whole = complete(client, "abc", 40, seed=1, temperature=2.0)[0]["text"]
    stop = next(a + b for a, b in pairwise(whole[5:]) if "�" not in (a, b))
    for value in (stop, [stop, "never in the text"]):
        found = complete(client, "abc", 40, seed=1, temperature=2.0, stop=value, logprobs=0)[0]
        assert found["text"] == whole[: whole.index(stop)]
        assert found["finish_reason"] == "stop"
        assert bytes(found_bytes(found["logprobs"])).decode(errors="replace") == found["text"]


def test_an_end_of_document_is_a_stop(client: Client) -> None:
    found = client.ok(PATH, prompt="abc", max_tokens=250, temperature=1e6, seed=1, n=4)  # about uniform: 1 in 260
    assert "stop" in [choice["finish_reason"] for choice in found["choices"]]
    assert found["usage"]["completion_tokens"] < 1000


def test_echo_returns_the_prompt_first(client: Client) -> None:
    text = complete(client, "Zoë", temperature=0)[0]["text"]
    assert complete(client, "Zoë", temperature=0, echo=True)[0]["text"] == "Zoë" + text
    nothing = client.ok(PATH, prompt="Zoë", max_tokens=0, echo=True)
    assert nothing["choices"][0]["text"] == "Zoë"
    assert nothing["usage"]["completion_tokens"] == 0


def test_logprobs_are_those_of_a_score(client: Client) -> None:
    found = complete(client, "héy", 5, seed=2, echo=True, logprobs=3)[0]["logprobs"]
    ids = [*encode("héy").tolist(), *(4 + byte for byte in found_bytes(found)[4:])]
    score = null_model().score(np.array(ids[:-1]))
    expected = [logprobs(score.logits[t], ids[t + 1], 3) for t in range(len(ids) - 1)]
    assert found["token_logprobs"] == [logprob for logprob, _ in expected]
    assert found["tokens"][:4] == ["h", "bytes:\\xc3", "bytes:\\xa9", "y"]
    assert found["text_offset"][:4] == [0, 1, 1, 2]


def found_bytes(logprobs: Json) -> list[int]:
    return [byte for some in logprobs["bytes"] for byte in some or []]


@pytest.mark.parametrize("k", [0, 1, 5, 20])
def test_the_chosen_token_is_among_the_most_likely_with_the_same_float(client: Client, k: int) -> None:
    found = complete(client, "abc", 30, seed=4, temperature=3.0, echo=True, logprobs=k)[0]["logprobs"]
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[token] == logprob
        assert len(top) in (k, k + 1)


def test_the_first_id_of_a_text_has_no_logprob(client: Client) -> None:
    found = complete(client, [[1, 70, 71], [70, 71]], 1, echo=True, logprobs=1)
    assert found[0]["logprobs"]["token_logprobs"][0] is None
    assert found[0]["logprobs"]["top_logprobs"][0] is None
    assert [len(choice["logprobs"]["tokens"]) for choice in found] == [4, 3]
    assert found[0]["logprobs"]["token_logprobs"][1:3] == found[1]["logprobs"]["token_logprobs"][:2]


def test_offsets_count_characters_from_the_prompts_start(client: Client) -> None:
    found = complete(client, "Zoë", 3, temperature=0, logprobs=0)[0]["logprobs"]
    echoed = complete(client, "Zoë", 3, temperature=0, logprobs=0, echo=True)[0]["logprobs"]
    assert found["text_offset"] == echoed["text_offset"][4:]


@pytest.mark.parametrize(
    "options",
    [{}, {"logprobs": 2}, {"return_patches": True}, {"logprobs": 1, "echo": True}],
    ids=["text", "logprobs", "patches", "echo"],
)
def test_a_stream_has_the_same_parts_as_the_whole(client: Client, options: Json) -> None:
    body = {"prompt": "Zoë", "max_tokens": 60, "seed": 9, "temperature": 3.0, "stop": ["no such text", "x"]} | options
    whole = client.ok(PATH, **body)["choices"][0]
    events = client.events(PATH, **body)
    assert text_of(events) == whole["text"]
    choices = [event["choices"][0] for event in events]
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["finish_reason"]
    for key in ("logprobs", "patches"):
        if whole.get(key) is None:
            assert not any(choice.get(key) for choice in choices)
            continue
        for name, values in whole[key].items():
            assert [value for choice in choices for value in (choice[key] or {}).get(name, [])] == values


def test_a_chunk_has_the_tokens_of_one_character(client: Client) -> None:
    events = client.events(PATH, prompt="Zoë", max_tokens=200, seed=9, temperature=5.0, logprobs=0, ignore_eos=True)
    chunks = [event["choices"][0] for event in events if event["choices"][0]["logprobs"]]
    assert {len(chunk["logprobs"]["tokens"]) for chunk in chunks} <= {1, 2, 3, 4}
    assert all(len(chunk["text"]) <= 2 for chunk in chunks)


def test_the_usage_is_a_chunk_of_its_own(client: Client) -> None:
    events = client.events(PATH, prompt="a", max_tokens=3, ignore_eos=True, stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    assert all(event["usage"] is None and event["choices"] for event in events[:-1])
    assert "usage" not in client.events(PATH, prompt="a", max_tokens=3)[0]


def test_streams_of_several_choices_are_interleaved(client: Client) -> None:
    body = {"prompt": ["abc", "xyz"], "n": 2, "max_tokens": 20, "seed": 1, "ignore_eos": True}
    whole = client.ok(PATH, **body)["choices"]
    events = client.events(PATH, **body)
    assert [text_of(events, i) for i in range(4)] == [choice["text"] for choice in whole]


def test_patches_have_one_entry_a_generated_byte(client: Client) -> None:
    found = complete(client, "abc", 30, temperature=0, return_patches=True, echo=True)[0]["patches"]
    stream = null_model().stream()
    stream.append("abc")
    assert found["bytes"] == list(b"".join(stream.generate(30, temperature=0.0, stop_at_eos=False)))
    score = null_model().score(stream.ids)
    starts = set(np.cumsum(score.patch_lengths).tolist())
    places = [4 + i for i, id in enumerate(stream.ids[4:].tolist()) if id >= 4]
    assert len(places) > 20
    assert found["starts"][: len(places)] == [place in starts for place in places]
    assert found["entropies"][: len(places)] == [float(score.entropies[place - 1]) for place in places]
