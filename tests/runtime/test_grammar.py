"""Constrained generation: every text matches its grammar, in samplers, streams and schedulers."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from blt_runtime import Model, Scheduler, Stream
from blt_runtime.backends.null import null_spec
from blt_runtime.errors import BackendError, BltError, InputError, MissingExtra, UsageError
from blt_runtime.grammar import MOST_CHARACTERS, Grammar, GrammarSampler, GrammarText
from blt_runtime.ids import EOS, encode
from blt_runtime.options import GenerateOptions
from tests.runtime.streams import model_of

SPEC = null_spec(local_kind="window", capacity_bytes=600, capacity_patches=600)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "größe": {"type": "number", "minimum": 0, "maximum": 3},
        "tags": {"type": "array", "maxItems": 3, "items": {"enum": ["a", "bé", "日本"]}},
    },
    "required": ["name", "größe", "tags"],
    "additionalProperties": False,
}
KEYS = ["a", "name", "größe", "日本", "x y", "emoji😀", 'quo"te', "back\\slash", "new\nline", "tab\tkey", "/", "$ref"]
VALUES = ["x", "größe", "日本\n", 1, -2.5, None, True, {"k": [1, "ü"]}, [], "", '"']


class RandomSchemas:
    """JSON schemas whose texts have a bounded length."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def schema(self, depth: int = 3) -> dict[str, Any]:
        leaf = [self.string, self.string, self.pattern, self.format, self.integer, self.number, self.enum, self.simple]
        inner = [self.object, self.object, self.array, self.tuple, self.any_of]
        if depth and self.random.random() < 0.6:
            return self.random.choice(inner)(depth - 1)
        return self.random.choice(leaf)()

    def sometimes(self, name: str, value: float) -> dict[str, Any]:
        return {name: value} if self.random.random() < 0.6 else {}

    def string(self) -> dict[str, Any]:
        least = self.random.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + self.random.randint(0, 12)}

    def pattern(self) -> dict[str, Any]:
        patterns = ["^[a-z]{1,5}$", "^[0-9]{2}-[0-9]{2}$", "^(foo|bar)+x?$", "^[äöü日本]{0,4}$", '^\\d{3}[A-F]*"?$']
        return {"type": "string", "pattern": self.random.choice(patterns), "maxLength": 12}

    def format(self) -> dict[str, Any]:
        return {"type": "string", "format": self.random.choice(["date", "date-time", "uuid", "time", "ipv4"])}

    def integer(self) -> dict[str, Any]:
        least = self.random.randint(-1000, 1000)
        most = least + self.random.randint(0, 100_000)
        return {"type": "integer", **self.sometimes("minimum", least), **self.sometimes("maximum", most)}

    def number(self) -> dict[str, Any]:
        least = self.random.choice([-5, -0.5, 1.25, 100])  # llguidance allows 0 where it is an exclusive bound
        most = least + self.random.choice([0.25, 1, 7.75, 1000])
        lower, upper = self.random.choice(["minimum", "exclusiveMinimum"]), self.random.choice(["maximum"])
        return {"type": "number", **self.sometimes(lower, least), **self.sometimes(upper, most)}

    def enum(self) -> dict[str, Any]:
        return {"enum": self.random.sample(VALUES, self.random.randint(1, 5))}

    def simple(self) -> dict[str, Any]:
        return self.random.choice([{"type": "boolean"}, {"type": ["boolean", "null"]}, {"const": {"ü": [None]}}])

    def any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.schema(depth) for _ in range(self.random.randint(1, 3))]}

    def array(self, depth: int) -> dict[str, Any]:
        least = self.random.randint(0, 2)
        most = least + self.random.randint(0, 3)
        return {"type": "array", "items": self.schema(depth), "minItems": least, "maxItems": most}

    def tuple(self, depth: int) -> dict[str, Any]:
        items = [self.schema(depth), self.schema(depth)]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": self.random.randint(0, 2)}

    def object(self, depth: int) -> dict[str, Any]:
        keys = self.random.sample(KEYS, self.random.randint(0, 4))
        return {
            "type": "object",
            "properties": {key: self.schema(depth) for key in keys},
            "required": [key for key in keys if self.random.random() < 0.6],
            "additionalProperties": False,
        }


def made(**how: Any) -> Grammar:
    """A grammar of our own: without the trial in another process."""
    return Grammar(**how, trusted=True)


def chain(levels: int) -> dict[str, Any]:
    """Schemas that refer to each other: each level is one more of llguidance's recursion."""
    items = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(levels)}
    return {"$defs": {**items, f"d{levels}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def random_logits(seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    while True:
        yield rng.standard_normal(260).astype(np.float32) * 3


def written(sampler: GrammarSampler, seed: int, force: bool = False, limit: int = 5000) -> bytes:
    """The text that a sampler chooses over random logits. force: append the ids that it forces at once."""
    ids: list[int] = []
    for logits in random_logits(seed):
        ids.append(sampler(logits))
        if ids[-1] == EOS or len(ids) > limit:
            break
        if force:
            ids += sampler.forced()
    assert ids.pop() == EOS
    return bytes(id - 4 for id in ids)


def stream_after(prompt: str = "JSON: ", model: Model | None = None) -> Stream:
    stream = (model or model_of(SPEC)).stream()
    stream.append(prompt)
    return stream


def bytes_of(stream: Stream, prompt: str = "JSON: ") -> bytes:
    return bytes(id - 4 for id in stream.ids[1 + len(prompt) :])


# --- samplers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_every_text_of_a_length_limited_schema_parses_and_is_valid(first: int) -> None:
    for seed in range(first, first + 50):
        schema = RandomSchemas(seed).schema()
        grammar = made(schema=schema)
        for draws in range(3):
            sampler = grammar.sampler(1.0, seed=draws)
            text = written(sampler, draws, force=bool(draws % 2))
            jsonschema.Draft202012Validator(schema).validate(json.loads(text.decode()))
            assert sampler.complete


def test_whitespace_is_fixed() -> None:
    texts = [written(made(schema=PERSON).sampler(1.0, seed=seed), seed).decode() for seed in range(20)]
    for text in texts:
        value = json.loads(text)
        shape = re.fullmatch(
            r'\{"name": ".*", "größe": [0-9.eE+-]+, "tags": \[(".{1,2}"(, (?="))?)*\]\}', text, re.DOTALL
        )
        assert shape is not None
        assert set(value) == set(PERSON["properties"])  # type: ignore[call-overload]


def test_flexible_whitespace_allows_line_breaks() -> None:
    fixed, flexible = made(schema=PERSON), made(schema=PERSON, whitespace="flexible")
    newline, brace = 4 + ord("\n"), 4 + ord("{")
    for grammar, allowed in ((fixed, False), (flexible, True)):
        text = GrammarText(grammar)
        text.take(brace)
        assert (newline in text.allowed()) is allowed


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ({"regex": r"[a-zé]{3,9} = [0-9]{2}"}, r"[a-zé]{3,9} = [0-9]{2}"),
        ({"lark": 'start: "x" /[a-z]{1,4}/ " -> " /[0-9]{1,3}/'}, r"x[a-z]{1,4} -> [0-9]{1,3}"),
        ({"schema": '{"enum": ["ja", "nein"]}'}, r'"(ja|nein)"'),
    ],
)
def test_every_kind_of_grammar_is_matched(grammar: dict[str, Any], pattern: str) -> None:
    compiled = made(**grammar)
    for seed in range(10):
        text = written(compiled.sampler(1.0, seed=seed), seed).decode()
        assert re.fullmatch(pattern, text)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 3.0])
def test_strings_are_valid_utf8_whatever_the_logits(temperature: float) -> None:
    grammar = made(schema={"type": "string", "minLength": 30, "maxLength": 40})
    logits = np.where(np.arange(260) >= 4 + 0x80, 20.0, 0.0).astype(np.float32)  # bytes outside ASCII
    sampler = grammar.sampler(temperature, seed=1)
    ids = list(iter(lambda: sampler(logits), EOS))
    text = json.loads(bytes(id - 4 for id in ids).decode())
    assert 30 <= len(text) <= 40
    assert any(c > "\x7f" for c in text)


def test_the_text_of_a_seed_does_not_depend_on_appending_forced_bytes() -> None:
    grammar = made(schema=PERSON)
    logits = np.random.default_rng(5).standard_normal(260).astype(np.float32)
    chosen, appended = grammar.sampler(1.0, seed=3), grammar.sampler(1.0, seed=3)
    one_by_one = list(iter(lambda: chosen(logits), EOS))
    at_once: list[int] = []
    while (id := appended(logits)) != EOS:
        forced = appended.forced()
        at_once += [id, *forced]
    assert at_once == one_by_one
    assert encode('"größe": ', bos=False).tolist()[0] in one_by_one


def test_forced_ids_are_those_without_an_alternative() -> None:
    text = GrammarText(made(schema=PERSON))
    forced = text.forced()
    assert bytes(id - 4 for id in forced) == b'{"name": "'
    for id in forced:
        assert text.allowed().tolist() == [id]
        text.take(id)
    assert len(text.allowed()) > 1


def test_options_of_sampling_apply_to_the_allowed_bytes() -> None:
    grammar = made(regex="[abc]")
    logits = np.zeros(260, dtype=np.float32)
    logits[[4 + ord("a"), 4 + ord("b"), 4 + ord("z")]] = 2.0, 3.0, 90.0
    assert grammar.sampler(0.0)(logits) == 4 + ord("b")
    assert grammar.sampler(1.0, top_k=1)(logits) == 4 + ord("b")
    p = grammar.sampler(1.0, top_k=2).probabilities(logits)
    assert np.flatnonzero(p).tolist() == [4 + ord("a"), 4 + ord("b")]
    assert p.sum() == pytest.approx(1)
    assert grammar.sampler(1.0).candidates(logits)[0].tolist() == [4 + ord(c) for c in "bac"]


def test_a_verified_draft_is_distributed_as_a_choice() -> None:
    grammar = made(regex="[abc]")
    rng = np.random.default_rng(1)
    logits, other = rng.standard_normal((2, 260))
    expected = grammar.sampler(1.0).probabilities(logits)
    counts = np.zeros(260)
    draws = np.random.default_rng(2)
    for _ in range(3000):
        sampler = grammar.sampler(1.0, seed=draws)
        id = sampler.verify(logits, *sampler.draft(other))
        assert sampler.complete
        counts[id] += 1
    assert np.abs(counts / 3000 - expected).max() < 0.04


def test_a_copy_continues_apart() -> None:
    sampler = made(schema=PERSON).sampler(1.0, seed=7)
    logits = np.random.default_rng(5).standard_normal(260).astype(np.float32)
    for _ in range(20):
        sampler(logits)
    copied = sampler.copy()
    rest = list(iter(lambda: copied(logits), EOS))
    assert list(iter(lambda: sampler(logits), EOS)) == rest


def test_skipping_an_id_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot skip an id"):
        made(regex="a").sampler().skip()


def test_a_text_that_has_ended_is_not_continued() -> None:
    sampler = made(regex="a").sampler()
    logits = np.zeros(260, dtype=np.float32)
    assert [sampler(logits), sampler(logits)] == [4 + ord("a"), EOS]
    assert sampler.forced() == []
    with pytest.raises(UsageError, match="this text has ended"):
        sampler(logits)


def test_one_grammar_serves_many_texts() -> None:
    grammar = made(regex="a{1,3}b")
    first, second = grammar.sampler(seed=1), grammar.sampler(seed=1)
    logits = np.zeros(260, dtype=np.float32)
    assert [first(logits) for _ in range(2)] == [second(logits) for _ in range(2)]


# --- grammars that are refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ({"schema": '{"type":'}, "the JSON schema is no JSON: "),
        ({"schema": "[]"}, "the JSON schema must be an object, not []"),
        ({"schema": "true"}, "the JSON schema must be an object, not True"),
        ({"schema": "[" * 100_000}, "the JSON schema is no JSON: "),
        ({"schema": {"x": float("nan")}}, "the JSON schema has no JSON: "),
        ({"schema": {"x": {1, 2}}}, "the JSON schema has no JSON: "),
        ({"schema": {"const": "\ud800"}}, "lone surrogates"),
        ({"schema": {"type": "nonsense"}}, "the JSON schema cannot be used: Invalid type: nonsense"),
        ({"schema": {"type": "string", "maxLength": -1}}, "Expected positive integer for 'maxLength'"),
        ({"schema": {"type": "string", "maxLength": 1, "minLength": 5}}, "Unsatisfiable schema"),
        ({"schema": {"not": {"type": "string"}}}, 'Unimplemented keys: ["not"]'),
        ({"schema": {"$ref": "https://example.com/x.json"}}, "is not present in a registry"),
        ({"schema": {"$ref": "#"}}, "no text matches it"),
        ({"schema": {"enum": []}}, "anyOf is empty"),
        ({"regex": "(("}, "the regular expression cannot be used: unclosed group"),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": r"[^\s\S]"}, "no text matches it"),
        ({"regex": "(" * 1000 + ")" * 1000}, "nest"),
        ({"regex": "x" * (MOST_CHARACTERS + 1)}, "the most is 131,072"),
        ({"regex": "\ud800"}, "lone surrogates"),
        ({"lark": "start: foo"}, 'unknown name: "foo"'),
        ({"lark": ""}, "the Lark grammar cannot be used"),
        ({"lark": "start: a\na: a 'x'"}, "the Lark grammar cannot be used"),
        ({"lark": "start: <[1]>"}, None),
    ],
    ids=range(25),
)
def test_a_grammar_that_cannot_be_used_is_one_short_line(grammar: dict[str, Any], message: str | None) -> None:
    if message is None:  # llguidance accepts a special id, which no text contains
        sampler = made(**grammar).sampler()
        with pytest.raises(InputError, match="allows no byte"):
            sampler(np.zeros(260, dtype=np.float32))
        return
    with pytest.raises(InputError) as caught:
        made(**grammar)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"regex": "a", "lark": "start: a"},
        {"regex": b"a"},
        {"lark": 5},
        {"schema": ["x"]},
        {"regex": "a", "whitespace": "none"},
        {"regex": "a", "trusted": 1},
    ],
    ids=range(7),
)
def test_wrong_arguments(how: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Grammar(**how)


@pytest.mark.parametrize("levels", [5, 2000])
def test_a_schema_too_deep_for_the_stack_is_refused(levels: int) -> None:
    """llguidance compiles references recursively: a long chain ends the process."""
    if levels < 100:
        assert written(Grammar(schema=chain(levels)).sampler(seed=1), 1).decode().startswith("[")
    else:
        with pytest.raises(InputError, match="the JSON schema cannot be used: it is too complex to compile"):
            Grammar(schema=chain(levels))


def test_a_grammar_that_takes_too_long_is_refused() -> None:
    slow = " & ".join(f"/.*w{i}.*/" for i in range(100))
    with pytest.raises(InputError, match="the Lark grammar cannot be used: it is too complex to compile"):
        Grammar(lark=f"start: T\nT: {slow}")


def test_a_grammar_that_becomes_too_complex_ends_its_text_alone() -> None:
    grammar = made(regex="(a{1,1000}){1,1000}")
    sampler = grammar.sampler(0.0)
    logits = -np.arange(260, dtype=np.float32)
    logits[EOS] = -1000
    with pytest.raises(InputError, match=r"allows no byte after \d+: lexer error: too many expressions"):
        list(iter(lambda: sampler(logits), EOS))
    assert grammar.sampler(0.0)(logits) == 4 + ord("a")


def test_a_trial_that_cannot_run_names_the_way_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(BackendError, match="pass trusted=True"):
        Grammar(regex="a")
    monkeypatch.setattr("sys.executable", "/bin/true")
    with pytest.raises(BackendError, match="pass trusted=True"):
        Grammar(regex="a")


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"llguidance is not installed: .*\[grammar\]"):
        Grammar(regex="a")


# --- streams -----------------------------------------------------------------------------------------------


def test_a_stream_writes_what_the_grammar_allows() -> None:
    grammar = made(schema=PERSON)
    for seed in range(5):
        text = b"".join(stream_after().generate(400, grammar=grammar, seed=seed))
        jsonschema.validate(json.loads(text), PERSON)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafting_forced_bytes_changes_no_byte(temperature: float) -> None:
    grammar = made(schema=PERSON)
    how: dict[str, Any] = {"temperature": temperature, "seed": 4}
    logits_of = []

    def text(**more: Any) -> bytes:
        stream = stream_after()
        done = b"".join(stream.generate(400, grammar=grammar, **how, **more))
        logits_of.append(stream.logits.copy())
        return done

    plain = stream_after()
    sampler = grammar.sampler(**how)
    ids = []
    while (id := sampler(plain.logits)) != EOS:
        plain.append_ids([id])
        ids.append(id - 4)
    assert text() == bytes(ids)
    for speculate in (grammar.drafter(), "lookup", "auto"):
        assert text(speculate=speculate) == bytes(ids)
    for logits in logits_of:
        np.testing.assert_array_equal(logits, plain.logits)


def test_forced_bytes_are_drafted() -> None:
    ways: list[dict[str, Any]] = [{}, {"speculate": made(schema=PERSON).drafter()}]
    for how in ways:
        stream = stream_after()
        text = b"".join(stream.generate(400, grammar=made(schema=PERSON), seed=4, **how))
        assert stream.speculation.accepted == stream.speculation.drafts > 15
        assert stream.speculation.tokens == len(text)


def test_a_text_that_the_limit_ends_is_a_prefix() -> None:
    sampler = made(schema=PERSON).sampler(seed=1)
    stream = stream_after()
    text = b"".join(stream.generate(15, sampler=sampler))
    assert text.startswith(b'{"name": "')
    complete = [sampler.complete]
    rest = b"".join(stream.generate(400, sampler=sampler))
    assert [*complete, sampler.complete] == [False, True]
    assert len(text) == 15
    jsonschema.validate(json.loads(text + rest), PERSON)


def test_stop_strings_end_a_text_under_a_grammar() -> None:
    stream = stream_after()
    text = b"".join(stream.generate(400, grammar=made(schema=PERSON), seed=1, stop="name"))
    assert text == b'{"'
    assert bytes_of(stream) == b'{"name'


def test_text_is_whole_characters() -> None:
    grammar = made(schema={"const": "größe 日本"})
    assert list(model_of(SPEC).generate_text("x", 30, grammar=grammar))[2:5] == ["r", "ö", "ß"]


@pytest.mark.parametrize("n", [1, 5, 30, 10_000])
def test_a_rewind_rolls_the_grammar_back(n: int) -> None:
    """The allowed ids and the forced ones are those of a fresh text with the bytes that are left."""
    grammar = made(schema=PERSON)
    sampler = grammar.sampler(1.0, seed=2)
    stream = stream_after()
    text = b"".join(stream.generate(400, sampler=sampler))
    stream.rewind(min(n, len(text)))
    left = text[: len(text) - min(n, len(text))]
    assert bytes_of(stream) == left
    fresh = GrammarText(grammar)
    assert fresh.become(encode(left, bos=False).tolist())
    list(stream.generate(0, sampler=sampler))
    sampler.follow(encode(left, bos=False))
    assert sampler.probabilities(stream.logits).nonzero()[0].tolist() == fresh.allowed().tolist()
    assert sampler.forced() == fresh.forced()
    more = b"".join(stream.generate(400, sampler=sampler))
    jsonschema.validate(json.loads(left + more), PERSON)


def test_a_rewind_before_the_beginning_begins_again() -> None:
    grammar = made(schema=PERSON)
    sampler = grammar.sampler(1.0, seed=2)
    stream = stream_after("JSON: ")
    list(stream.generate(20, sampler=sampler))
    stream.rewind(23)
    assert bytes_of(stream, "JSO") == b""
    stream.append("N: ")
    text = b"".join(stream.generate(400, sampler=sampler))
    jsonschema.validate(json.loads(text), PERSON)


def test_bytes_appended_between_are_part_of_the_text() -> None:
    grammar = made(schema=PERSON)
    sampler = grammar.sampler(1.0, seed=2)
    stream = stream_after()
    pieces = stream.generate(400, sampler=sampler)
    text = b"".join(next(pieces) for _ in range(12))
    stream.rewind(2)
    stream.append('Ada"')
    rest = b"".join(pieces)
    value = json.loads(text[:-2] + b'Ada"' + rest)
    assert value["name"] == "Ada"
    jsonschema.validate(value, PERSON)


def test_appended_bytes_that_do_not_match_are_one_error() -> None:
    sampler = made(schema=PERSON).sampler(seed=1)
    stream = stream_after()
    list(stream.generate(12, sampler=sampler))
    stream.rewind(2)
    stream.append('"; drop')
    with pytest.raises(InputError, match="does not match the grammar from byte 11 on: b'; drop'"):
        list(stream.generate(5, sampler=sampler))


@pytest.mark.parametrize("how", ["reset", "restore"])
def test_a_sampler_begins_again_after_a_reset_or_a_restore(how: str) -> None:
    sampler = made(schema=PERSON).sampler(seed=1)
    stream = stream_after()
    before = stream.snapshot()
    list(stream.generate(25, sampler=sampler))
    stream.reset() if how == "reset" else stream.restore(before)
    text = b"".join(stream.generate(400, sampler=sampler))
    jsonschema.validate(json.loads(text), PERSON)


def test_a_sliding_stream_keeps_the_grammar() -> None:
    model = model_of(null_spec(local_kind="window", capacity_bytes=64, capacity_patches=64))
    stream = model.stream(overflow="slide")
    stream.append("JSON: ")
    schema = {"type": "array", "minItems": 30, "maxItems": 30, "items": {"enum": ["größe", "name"]}}
    sampler = made(schema=schema).sampler(seed=1)
    text = b"".join(stream.generate(200, sampler=sampler))
    assert stream.forgotten > 100
    stream.rewind(10)
    rest = b"".join(stream.generate(400, sampler=sampler))
    jsonschema.validate(json.loads(text[:-10] + rest), schema)


# --- schedulers and options --------------------------------------------------------------------------------


def test_a_scheduler_writes_what_a_stream_writes() -> None:
    grammar = made(schema=PERSON)
    with Scheduler(model_of(SPEC), streams=3) as scheduler:
        requests = [scheduler.submit("JSON: ", 400, grammar=grammar, seed=seed) for seed in range(6)]
        for seed, request in enumerate(requests):
            assert request.result() == b"".join(stream_after().generate(400, grammar=grammar, seed=seed))
            assert request.finish == "eos"


def test_a_scheduler_says_that_a_text_is_a_prefix() -> None:
    with Scheduler(model_of(SPEC), streams=1) as scheduler:
        request = scheduler.submit("JSON: ", 12, grammar=made(schema=PERSON))
        assert request.result().startswith(b'{"name": "')
        assert request.finish == "length"


def test_a_grammar_that_fails_ends_its_request_alone() -> None:
    bad, good = made(regex="(a{500,1000}){500,1000}"), made(regex="b{20}")
    with Scheduler(model_of(SPEC), streams=2) as scheduler:
        failing, working = scheduler.submit("x", 500, grammar=bad), scheduler.submit("x", 500, grammar=good)
        with pytest.raises(InputError, match="too many expressions"):
            failing.result()
        assert working.result() == b"b" * 20


def test_a_grammar_needs_the_end_of_its_text() -> None:
    with pytest.raises(UsageError, match="ends at EOS"):
        GenerateOptions(grammar=made(regex="a"), stop_at_eos=False)


@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_grammar_beside_a_sampler_is_refused(as_keyword: bool) -> None:
    grammar, stream = made(regex="a"), stream_after()
    how: Any = {"grammar": grammar} if as_keyword else {"options": GenerateOptions(grammar=grammar)}
    with pytest.raises(UsageError, match="no effect beside a sampler"):
        stream.generate(5, sampler=grammar.sampler(), **how)


def test_the_grammar_option_is_a_grammar() -> None:
    with pytest.raises(BltError, match=r"grammar must be a Grammar \(blt_runtime.grammar\), not 'a'"):
        stream_after().generate(5, grammar="a")  # type: ignore[arg-type]
