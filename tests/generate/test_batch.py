"""Many prompts through a scheduler: the order of records, their seeds, lines with mistakes, and lines in flight."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest

from blt.generate.batch import run, window
from blt.generate.chat_format import ChatFormat
from blt.generate.prompts import LONGEST, Defaults, Line, line_seed, read_lines
from blt_runtime import GenerateOptions, Scheduler
from blt_runtime.backends.null import null_spec
from blt_runtime.chat import STOPS, Message, plain
from blt_runtime.errors import BackendError, UsageError
from tests.runtime.streams import model_of

SPEC = null_spec(local_kind="window", capacity_bytes=200, capacity_patches=200)
DEFAULTS = Defaults(9, GenerateOptions(), 7)


def lines(*records: object) -> bytes:
    return b"".join(r if isinstance(r, bytes) else json.dumps(r).encode() + b"\n" for r in records)


def results(data: bytes, defaults: Defaults = DEFAULTS, *, streams: int = 3, first: int = 0) -> list[dict[str, Any]]:
    with Scheduler(model_of(SPEC), streams=streams, slice=4, waiting=window(streams)) as scheduler:
        found = run(scheduler, read_lines(io.BytesIO(data)), defaults, most=window(streams), first=first)
        return [json.loads(record.content) for record in found]


def alone(prompt: bytes, n: int, **options: Any) -> bytes:
    stream = model_of(SPEC).stream()
    stream.append(prompt)
    return b"".join(stream.generate(n, **options))


def data_of(record: dict[str, Any]) -> bytes:
    return base64.b64decode(record["base64"]) if "base64" in record else str(record["text"]).encode()


PROMPTS: list[dict[str, Any]] = [{"prompt": "text " * (i % 5), "n": 1 + 17 * i % 20} for i in range(12)]


def test_records_come_in_the_order_of_the_lines_and_are_what_streams_generate() -> None:
    found = results(lines(*PROMPTS))
    assert [record["index"] for record in found] == list(range(12))
    for i, (record, asked) in enumerate(zip(found, PROMPTS, strict=True)):
        prompt = asked["prompt"].encode()
        assert record["seed"] == line_seed(7, i)
        assert data_of(record) == alone(prompt, asked["n"], seed=record["seed"])
        assert (record["prompt_bytes"], record["new_bytes"]) == (len(prompt), len(data_of(record)))


@pytest.mark.parametrize("streams", [1, 8])
def test_results_do_not_depend_on_streams_and_on_where_a_run_began(streams: int) -> None:
    whole = results(lines(*PROMPTS))
    assert results(lines(*PROMPTS), streams=streams) == whole
    assert results(lines(*PROMPTS[5:]), streams=streams, first=5) == whole[5:]


def test_lines_and_runs_have_seeds_of_their_own() -> None:
    assert len({line_seed(seed, index) for seed in range(20) for index in range(20)}) == 400
    assert line_seed(2**80, 5) < 2**53


def test_a_line_has_options_of_its_own() -> None:
    own = {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 3}
    records = results(lines({"prompt": "a", **own, "max_bytes": 30}, {"prompt": "a", "temperature": 0, "top_k": None}))
    assert data_of(records[0]) == alone(b"a", 30, **own)
    assert records[0]["seed"] == 3
    assert data_of(records[1]) == alone(b"a", 9, temperature=0)


def test_a_prompt_may_be_bytes_or_a_conversation() -> None:
    chat = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}
    prompt = plain([Message("system", "Be brief."), Message("user", "Hi")])
    found = results(lines({"prompt_base64": "/wA="}, {**chat, "stop": "a"}))
    assert data_of(found[0]) == alone(b"\xff\0", 9, seed=line_seed(7, 0))
    assert data_of(found[1]) == alone(prompt, 9, seed=line_seed(7, 1), stop=["a", *STOPS])


def test_messages_have_the_format_of_the_model() -> None:
    shouted = ChatFormat(lambda messages: b"".join(str(m.content).upper().encode() for m in messages), (b"!",))
    defaults = replace(DEFAULTS, format=shouted)
    found = results(lines({"messages": [{"role": "user", "content": "hi"}], "n": 20}), defaults)
    assert data_of(found[0]) == alone(b"HI", 20, seed=line_seed(7, 0), stop="!")


def test_text_that_is_not_utf8_is_in_base64_too() -> None:
    found = results(lines(*[{"prompt": "a", "temperature": 3, "n": 30}] * 5))
    assert any("base64" in record for record in found)
    for record in found:
        assert data_of(record).decode(errors="replace") == record["text"]


def test_the_reason_of_the_end_is_that_of_the_server() -> None:
    whole = alone(b"a", 30, seed=1, stop_at_eos=False)
    stop = whole.decode(errors="ignore")[5]
    found = results(lines({"prompt": "a", "seed": 1, "n": 5}, {"prompt": "a", "seed": 1, "n": 30, "stop": [stop]}))
    assert [record["finish_reason"] for record in found] == ["length", "stop"]


def test_an_id_comes_back() -> None:
    found = results(lines({"prompt": "a", "id": "x\u2028"}, {"prompt": "a", "id": 3}, {"prompt": 7, "id": 1.5}))
    assert [record["id"] for record in found] == ["x\u2028", 3, 1.5]


MISTAKES = {
    b"nonsense\n": "the line is not valid JSON",
    b"\xff\n": "the line is not valid JSON",
    b'{"prompt": "\\ud800"}\n': "the line is not valid JSON",
    b"[1]\n": r"the line must be a JSON object, not \[1\]",
    b"{}\n": "exactly one of prompt, prompt_base64 and messages",
    b'{"prompt": "a", "messages": []}\n': "exactly one of",
    b'{"prompt": null}\n': "exactly one of",
    b'{"prompt": "a", "temprature": 1}\n': "unknown key 'temprature': did you mean 'temperature'",
    b'{"prompt": 7}\n': "prompt must be text, not 7",
    b'{"prompt_base64": "="}\n': "prompt_base64 is not valid",
    b'{"prompt_base64": "\\u00e9"}\n': "prompt_base64 is not valid",
    b'{"messages": []}\n': "messages must be a list of objects",
    b'{"messages": [{"role": "user"}]}\n': "a message must have a role and a text",
    b'{"messages": [{"role": "robot", "content": ""}]}\n': "role 'robot' is unknown",
    b'{"prompt": "a", "n": 0}\n': "n must be a whole number of at least 1",
    b'{"prompt": "a", "n": 1, "max_bytes": 1}\n': "n and max_bytes mean the same",
    b'{"prompt": "a", "n": 500}\n': "500 new ones exceed the 200",
    b'{"prompt": "a", "temperature": "hot"}\n': "temperature must be a number",
    b'{"prompt": "a", "top_k": true}\n': "top_k must be",
    b'{"prompt": "a", "stop": [""]}\n': "a stop string must not be empty",
    b'{"prompt": "a", "stop": {"b": 1}}\n': "stop must be text, bytes or a list",
    b'{"prompt": "a", "seed": -1}\n': "seed must be",
    b'{"prompt": "a", "id": [1]}\n': "id must be text or a number",
    b'"' + b"x" * LONGEST + b'"\n': f"the line has more than {LONGEST:,} bytes",
}


@pytest.mark.parametrize("line", MISTAKES, ids=range(len(MISTAKES)))
def test_a_line_with_a_mistake_has_a_record_with_its_error_at_its_place(line: bytes) -> None:
    before, wrong, after = results(lines({"prompt": "a"}, line, {"prompt": "b"}))
    assert wrong.keys() == {"index", "error"}
    assert wrong["index"] == 1
    with pytest.raises(UsageError, match=MISTAKES[line]):
        raise UsageError(wrong["error"])
    assert [before, after] == [results(lines({"prompt": "a"}))[0], results(lines({"prompt": "b"}), first=2)[0]]


def test_a_text_that_needs_too_many_patches_has_a_record_with_its_error() -> None:
    spec = null_spec(local_kind="window", capacity_patches=6)
    with Scheduler(model_of(spec), streams=2) as scheduler:
        prompts = read_lines(io.BytesIO(lines({"prompt": "text " * 20, "id": 1}, {"prompt": "", "n": 1})))
        wrong, right = run(scheduler, prompts, DEFAULTS, most=4)
    assert "capacity of 6 patches" in json.loads(wrong.content)["error"]
    assert json.loads(wrong.content)["id"] == 1
    assert not right.failed


def test_blank_lines_are_not_counted_and_a_last_line_needs_no_end() -> None:
    data = b'\n{"prompt": "a"}\r\n \n\n{"prompt": "b"}'
    assert [record["index"] for record in results(data)] == [0, 1]
    assert sum(line.size for line in read_lines(io.BytesIO(data))) == len(data)


def test_a_backend_that_fails_ends_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise BackendError("the device is gone")

    with Scheduler(model_of(SPEC), streams=2) as scheduler:
        monkeypatch.setattr(scheduler._batch, "round", fail)
        with pytest.raises(BackendError, match="the device is gone"):
            list(run(scheduler, read_lines(io.BytesIO(lines({"prompt": "a"}))), DEFAULTS, most=4))


def test_lines_in_flight_are_bounded() -> None:
    read = 0

    def endless() -> Iterator[Line]:
        nonlocal read
        while True:
            read += 1
            yield Line(b'{"prompt": "a", "n": 1}', 1)

    with Scheduler(model_of(SPEC), streams=2, waiting=10) as scheduler:
        found = run(scheduler, endless(), DEFAULTS, most=10)
        for done in range(1, 60):
            assert json.loads(next(found).content)["index"] == done - 1
            assert read - done < 10
            assert sum(scheduler.load) <= 10


class Answer:
    """A request that has ended, or (late) that ends when its result is asked for. live, most: how many exist."""

    live = most = 0

    def __init__(self, text: bytes, late: bool) -> None:
        self.finish = None if late else "length"
        self._text = text
        Answer.live += 1
        Answer.most = max(Answer.most, Answer.live)

    def result(self) -> bytes:
        self.finish = "length"
        return self._text

    def __del__(self) -> None:
        Answer.live -= 1


class Instant:
    """Answers with the prompt, and late to every thousandth line."""

    submitted = 0

    def submit(self, text: bytes, n: int, *, options: GenerateOptions) -> Answer:
        self.submitted += 1
        return Answer(text, late=self.submitted % 1000 == 0)


def test_of_20_000_lines_few_are_in_memory() -> None:
    data = b"".join(b'{"prompt": "%d"}\n' % i for i in range(20_000))
    found = run(cast("Scheduler", Instant()), read_lines(io.BytesIO(data)), DEFAULTS, most=window(16))
    assert all(b'"text": "%d"' % i in record.content for i, record in enumerate(found))
    assert Answer.live == 0
    assert Answer.most <= window(16)
