"""The options of generation: the same list, defaults and refusals at every entry point."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, asdict, fields, replace
from typing import Any

import pytest

from blt_runtime import Drafter, Model, Scheduler
from blt_runtime.backends.null import null_spec
from blt_runtime.errors import UsageError
from blt_runtime.ids import encode
from blt_runtime.options import NAMES, GenerateKeywords, GenerateOptions, resolve
from blt_runtime.sampling import Sampler
from tests.runtime.streams import model_of

Entry = Callable[..., object]
ENTRIES = ("generate", "generate_ids", "generate_text", "submit", "submit_ids")


@pytest.fixture
def model() -> Model:
    return model_of(null_spec(capacity_bytes=300))


@pytest.fixture
def entries(model: Model) -> Iterator[dict[str, Entry]]:
    """Every method that generates, over ten bytes after the same prompt; each gives the same bytes as the others."""

    def after(prompt: str) -> Any:
        stream = model.stream()
        stream.append(prompt)
        return stream

    def of_ids(ids: Iterator[int]) -> bytes:
        return bytes(id - 4 for id in ids if id >= 4)

    with Scheduler(model, streams=2) as scheduler:
        yield {
            "generate": lambda **how: b"".join(after("ab").generate(10, **how)),
            "generate_ids": lambda **how: of_ids(after("ab").generate_ids(10, **how)),
            "generate_text": lambda **how: "".join(model.generate_text("ab", 10, **how)),
            "submit": lambda **how: scheduler.submit("ab", 10, **how).result(),
            "submit_ids": lambda **how: scheduler.submit_ids(encode("ab"), 10, **how).result(),
        }


def test_the_keywords_are_the_fields() -> None:
    assert tuple(GenerateKeywords.__annotations__) == NAMES == tuple(field.name for field in fields(GenerateOptions))


def test_defaults() -> None:
    assert asdict(GenerateOptions()) == {
        "temperature": 0.8,
        "top_k": None,
        "top_p": None,
        "min_p": None,
        "seed": None,
        "stop": None,
        "stop_at_eos": True,
        "speculate": "off",
        "draft": 16,
        "grammar": None,
    }


def test_every_entry_point_has_the_same_defaults(entries: dict[str, Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each leaves all of them to `GenerateOptions`, and passes none on by position."""
    seen: list[GenerateOptions] = []

    def recorded(self: GenerateOptions, random: object = None) -> Sampler:
        seen.append(self)
        return Sampler(0.0)

    for name, entry in entries.items():
        seen.clear()
        monkeypatch.setattr(GenerateOptions, "sampler", recorded)
        entry()
        monkeypatch.undo()
        assert seen == [GenerateOptions()], name


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_point_takes_keywords_options_or_both(entries: dict[str, Entry], entry: str) -> None:
    hot = GenerateOptions(temperature=5.0, seed=3, stop_at_eos=False)
    text = entries[entry](temperature=5.0, seed=3, stop_at_eos=False)
    assert text == entries[entry](options=hot)
    assert text == entries[entry](options=replace(hot, seed=4), seed=3) != entries[entry](options=replace(hot, seed=4))


def test_every_entry_point_gives_the_same_bytes(entries: dict[str, Entry]) -> None:
    texts = [entry(temperature=5.0, seed=3, stop_at_eos=False) for entry in entries.values()]
    whole = texts[0]
    assert isinstance(whole, bytes)
    assert len(whole) >= 9
    assert texts == [whole, whole, whole.decode("utf-8", errors="replace"), whole, whole]


BAD: list[tuple[dict[str, object], str]] = [
    ({"temperature": -1}, "temperature must be a number from 0 up"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_k": 0}, "top_k must be a whole number of at least 1"),
    ({"top_k": 2.5}, "top_k"),
    ({"top_p": 0}, "top_p must be a number above 0 and at most 1"),
    ({"min_p": 2}, "min_p must be a number between 0 and 1"),
    ({"seed": -1}, "seed must be a whole number from 0 up"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "a stop string must not be empty"),
    ({"stop": ["a", ""]}, "a stop string must not be empty"),
    ({"speculate": "lokup"}, "speculate 'lokup' is unknown: did you mean 'lookup'"),
    ({"speculate": None}, "speculate None is unknown"),
    ({"draft": 0}, "draft must be a whole number of at least 1"),
    ({"draft": 1.5}, "draft"),
    ({"temprature": 1.0}, "unknown option 'temprature' of generation: did you mean 'temperature'"),
]


@pytest.mark.parametrize(("keywords", "message"), BAD, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_every_entry_point_refuses_the_same_values(
    entries: dict[str, Entry], keywords: dict[str, object], message: str
) -> None:
    for entry in entries.values():
        with pytest.raises(UsageError, match=message):
            entry(**keywords)


@pytest.mark.parametrize(
    ("keywords", "message"), BAD[:-1], ids=lambda value: str(value) if isinstance(value, dict) else ""
)
def test_options_refuse_the_same_values(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GenerateOptions(**keywords)


def test_a_sampler_replaces_the_sampling_options(model: Model) -> None:
    ids = list(model.stream().generate_ids(10, temperature=5.0, seed=3, stop_at_eos=False))
    made = model.stream().generate_ids(10, sampler=Sampler(5.0, seed=3), options=GenerateOptions(stop_at_eos=False))
    assert list(made) == ids
    with Scheduler(model, streams=1) as scheduler:
        for call in (model.stream().generate_ids, lambda n, **how: scheduler.submit_ids(encode("a"), n, **how)):
            for keyword in ({"temperature": 0.5}, {"top_k": 2}, {"seed": 1}):
                with pytest.raises(UsageError, match=f"{next(iter(keyword))} has no effect beside a sampler"):
                    call(10, sampler=Sampler(5.0), **keyword)


def test_ids_have_no_stop_strings_and_a_scheduler_does_not_speculate(model: Model) -> None:
    with pytest.raises(UsageError, match="stop applies to bytes"):
        model.stream().generate_ids(1, stop="a")
    with Scheduler(model, streams=1) as scheduler:
        for drafter in ("lookup", Drafter()):
            with pytest.raises(UsageError, match="does not speculate"):
                scheduler.submit("a", 1, speculate=drafter)


def test_options_are_values() -> None:
    options = GenerateOptions(stop=iter(list[str | bytes](["a", b"b"])))
    assert options.stop == ("a", b"b")
    assert resolve(options, {}) == options
    assert resolve(options, {"top_k": 3}) == replace(options, top_k=3) != options
    assert GenerateOptions() == resolve(None, {})
    with pytest.raises(FrozenInstanceError):
        options.top_k = 3  # type: ignore[misc]


def test_options_are_keyword_only(model: Model) -> None:
    with pytest.raises(TypeError, match="positional"):
        GenerateOptions(0.5)  # type: ignore[call-arg]
    for method in (
        type(model.stream()).generate,
        type(model.stream()).generate_ids,
        Scheduler.submit,
        Model.generate_text,
    ):
        kinds = [p.kind for p in list(inspect.signature(method).parameters.values())]
        assert sum(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds) <= 3
