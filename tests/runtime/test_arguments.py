"""Every public method of every public name, called with values of many wrong types: only BltError is raised, in one
line, and nothing has changed."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from types import CoroutineType, GeneratorType
from typing import Any, NamedTuple

import numpy as np
import pytest

import blt_runtime
from blt_runtime import (
    BltError,
    Bundle,
    Drafter,
    GenerateOptions,
    PatchRule,
    Request,
    Scheduler,
    Snapshot,
    Stream,
    Token,
)
from blt_runtime.backends.null import NullBackend, null_spec
from blt_runtime.errors import UsageError
from blt_runtime.ids import BOS
from blt_runtime.options import NAMES
from blt_runtime.requests import Work
from blt_runtime.sampling import Sampler
from tests.runtime.bundles import write_bundle
from tests.runtime.streams import model_of

SPEC = null_spec(capacity_bytes=40, capacity_patches=40)
CYCLE: list[Any] = []
CYCLE.append(CYCLE)
WRONG: dict[str, Any] = {
    "None": None,
    "True": True,
    "zero": 0,
    "seven": 7,
    "negative": -1,
    "huge": 10**30,
    "more digits than Python prints": 10**5000,
    "fraction": 1.5,
    "infinite": math.inf,
    "nan": math.nan,
    "complex": 1j,
    "empty text": "",
    "text": "x",
    "long text": "x" * 100_000,
    "surrogate": "\ud800",
    "line break": "a\nb",
    "bytes": b"\xff\x00",
    "bytearray": bytearray(b"ab"),
    "memoryview": memoryview(b"ab"),
    "path": Path("/nowhere"),
    "empty list": [],
    "ids": [5, 6],
    "tuple": (5, 6),
    "range": range(3),
    "ids too large": [5, 260],
    "negative ids": [-1],
    "huge ids": [10**30],
    "64-bit ids": [2**63],
    "bools": [True, 5],
    "fractions": [1.5],
    "texts": ["a", "b"],
    "numbers and texts": ["a", 7],
    "nested": [[1], [2]],
    "ragged": [[1], [2, 3]],
    "circular": CYCLE,
    "dict": {"a": 1},
    "set": {5},
    "iterator": None,  # made anew for each call
    "object": object(),
    "class": int,
    "function": len,
    "numpy integer": np.int64(5),
    "numpy unsigned": np.uint8(5),
    "numpy float": np.float32(0.5),
    "numpy nan": np.float64("nan"),
    "numpy bool": np.bool_(True),
    "numpy text": np.str_("x"),
    "numpy date": np.datetime64("2020-01-01"),
    "array": np.array([5, 6]),
    "array of bytes": np.array([5, 6], np.uint8),
    "array of fractions": np.array([1.5]),
    "array of texts": np.array(["a"]),
    "array without dimensions": np.array(5),
    "matrix": np.zeros((2, 2), np.int64),
    "array of objects": np.array([object(), None]),
    "empty array": np.zeros(0),
}


def is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_whole(value) or (isinstance(value, float | np.floating) and math.isfinite(value))


def is_flag(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def is_text(value: Any) -> bool:
    return isinstance(value, str | bytes | bytearray)


def are_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and (value.size == 0 or value.dtype.kind in "iu")
    return isinstance(value, list | tuple | range) and all(map(is_whole, value))


def is_hashable(value: Any) -> bool:
    return isinstance(value, Hashable)


def is_stop(value: Any) -> bool:
    return is_text(value) or (isinstance(value, Iterable) and not isinstance(value, dict) and value is not CYCLE)


def optional(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def anything(value: Any) -> bool:
    return True


def nothing(value: Any) -> bool:
    return False


class Parameter(NamedTuple):
    """fits: whether a value has the right type (it may still be refused). given: a good value, if one is required."""

    fits: Callable[[Any], bool]
    given: Any = inspect.Parameter.empty


GENERATION = {
    "temperature": Parameter(is_number),
    "top_k": Parameter(optional(is_whole)),
    "top_p": Parameter(optional(is_number)),
    "min_p": Parameter(optional(is_number)),
    "seed": Parameter(optional(is_whole)),
    "stop": Parameter(optional(is_stop)),
    "stop_at_eos": Parameter(is_flag),
    "speculate": Parameter(nothing),
    "draft": Parameter(is_whole),
    "grammar": Parameter(lambda value: value is None),
}
OPTIONS = {"options": Parameter(lambda value: value is None), **GENERATION}
NONE = Parameter(lambda value: value is None)
N = Parameter(is_whole, 3)
PROMPT, IDS = Parameter(is_text, "ab"), Parameter(are_ids, [1, 70, 71])
STREAM = {"bos": Parameter(is_flag), "seed": Parameter(optional(is_whole)), "overflow": Parameter(nothing)}
ANY = Parameter(anything)
SUBMIT = {
    "after": NONE,
    "tokens": Parameter(is_flag),
    "logprobs": NONE,
    "prompt_logprobs": Parameter(is_flag),
    "prefix_group": Parameter(is_hashable),
    **OPTIONS,
}


def is_path(value: Any) -> bool:
    return isinstance(value, str | Path)


PARAMETERS: dict[str, dict[str, Parameter]] = {
    "BltError": {},
    "Bundle": {"path": Parameter(anything, Path("x")), "manifest": Parameter(anything, None)},
    "Bundle.open": {"path": Parameter(is_path, "BUNDLE"), "verify": Parameter(nothing)},
    "Bundle.graph_file": {"group": Parameter(nothing, "encoder")},
    "Bundle.row_graph_file": {"group": Parameter(nothing, "encoder")},
    "Bundle.resident_graph_file": {"group": Parameter(nothing, "encoder")},
    "Bundle.table_graph_file": {},
    "Bundle.hash_tables": {},
    "Drafter": {},
    "Drafter.propose": {"ids_N": Parameter(anything, [1]), "limit": Parameter(anything, 1)},
    "Drafter.extend": {"ids_N": Parameter(anything, [1]), "logits_V": Parameter(anything, [1])},
    "Drafter.settle": {"position": Parameter(anything, 1), "accepted": Parameter(anything, True)},
    "GenerateOptions": GENERATION,
    "GenerateOptions.sampler": {"random": Parameter(lambda value: value is None or is_whole(value))},
    "Model": {
        "spec": Parameter(nothing, SPEC),
        "backend": Parameter(nothing, NullBackend(SPEC)),
        "hash_tables": NONE,
        "manifest": ANY,
        "files": NONE,
    },
    "Model.open": {
        "path": Parameter(is_path, "BUNDLE"),
        "backend": Parameter(nothing, "null"),
        "threads": Parameter(optional(is_whole)),
        "provider": Parameter(nothing),
        "verify": Parameter(nothing),
        "precision": NONE,
        "batched": Parameter(is_flag),
        "prepack": Parameter(optional(is_flag)),
        "hash_tables": Parameter(nothing),
        "trust_engines": Parameter(is_flag),
        "engine_cache": NONE,
        "many": Parameter(optional(is_flag)),
    },
    "Model.stream": STREAM,
    "Model.score": {"ids": IDS, "patch_lengths": Parameter(optional(are_ids))},
    "Model.generate_text": {"prompt": PROMPT, "n": N, "overflow": Parameter(nothing), **OPTIONS},
    "PatchRule": {
        "scheme": Parameter(nothing, "entropy"),
        "threshold": Parameter(is_number, 1.0),
        "threshold_add": Parameter(optional(is_number)),
        "monotonic": Parameter(is_flag),
        "patch_size": Parameter(optional(is_whole)),
        "max_patch_length": Parameter(optional(is_whole)),
        "reset_newlines": Parameter(is_flag),
        "entropy_dtype": Parameter(nothing),
    },
    "PatchRule.from_dict": {"data": Parameter(nothing, {"scheme": "space"})},
    "PatchRule.to_dict": {},
    "Request": {"work": Parameter(nothing, Work(np.array([1]), 3, Sampler(0.0)))},
    "Request.cancel": {},
    "Request.result": {},
    "Request.result_async": {},
    "Request.tokens": {},
    "Scheduler": {
        "model": Parameter(nothing, model_of(SPEC)),
        "streams": Parameter(is_whole),
        "capacity": Parameter(optional(is_whole)),
        "waiting": Parameter(is_whole),
        "slice": Parameter(is_whole),
        "share": Parameter(is_number),
        "prefix_bytes": Parameter(is_whole),
    },
    "Scheduler.submit": {"prompt": PROMPT, "n": N, **SUBMIT},
    "Scheduler.submit_ids": {"ids": IDS, "n": N, "sampler": NONE, **SUBMIT},
    "Scheduler.read": {"prefix": PROMPT},
    "Scheduler.close": {},
    "Score": {name: Parameter(anything, None) for name in ("ids", "entropies", "patch_lengths", "logits")},
    "Snapshot": {name: Parameter(anything, None) for name in Snapshot.__dataclass_fields__},
    "Snapshot.is_of": {"spec": Parameter(anything, SPEC), "owner": Parameter(anything, None)},
    "Stream": {
        "spec": Parameter(nothing, SPEC),
        "backend": Parameter(nothing, NullBackend(SPEC)),
        "hash_tables": NONE,
        "files": NONE,
        **STREAM,
    },
    "Stream.append": {"text": PROMPT, "cancelled": Parameter(optional(callable))},
    "Stream.append_ids": {"ids": IDS, "cancelled": Parameter(optional(callable))},
    "Stream.generate": {"n": N, "sampler": NONE, **OPTIONS},
    "Stream.generate_ids": {"n": N, "sampler": NONE, **OPTIONS},
    "Stream.reset": {},
    "Stream.restore": {"snapshot": Parameter(nothing, None)},
    "Stream.rewind": {"n_tokens": Parameter(is_whole, 1)},
    "Stream.score_ids": {"ids": IDS, "patch_lengths": Parameter(optional(are_ids))},
    "Stream.snapshot": {},
    "Token": {name: Parameter(anything, None) for name in Token.__dataclass_fields__},
}
"""Every public method, and the constructor of every public name."""

OTHER_ERRORS = ("Model", "Stream", "PatchRule", "PatchRule.from_dict")
"""Configurations: wrong ones are a ConfigError. Wrong patch lengths are an InputError."""
FORMER = ("guesses", "right")
CALLABLE = {"function": lambda: False, "class": dict}
"""Wrong values that a caller may pass as `cancelled`: with results that are false."""


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """An object of every public class."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    write_bundle(folder)
    model = model_of(SPEC)
    stream = model.stream()
    stream.append("ab cd")
    with Scheduler(model, streams=1) as scheduler:
        request = scheduler.submit("ab", 2, stop_at_eos=False, prompt_logprobs=True, tokens=True)
        request.result()
        yield {
            "BltError": BltError("x"),
            "Bundle": Bundle.open(folder),
            "Drafter": Drafter(),
            "GenerateOptions": GenerateOptions(),
            "Model": model,
            "PatchRule": PatchRule("space"),
            "Request": request,
            "Scheduler": scheduler,
            "Score": model.score([1, 5]),
            "Snapshot": stream.snapshot(),
            "Stream": stream,
            "Token": Token(None, b"", None, (), 0.0, False),
        }


def inherited(kind: type) -> set[str]:
    return set(dir(Exception)) if issubclass(kind, Exception) else set()


def public_callables() -> dict[str, Callable[..., Any]]:
    """The constructors and the public methods (class methods too) of the public names."""
    found: dict[str, Callable[..., Any]] = {}
    for name in blt_runtime.__all__:
        kind = getattr(blt_runtime, name)
        found[name] = kind
        for attribute in dir(kind):
            value = inspect.getattr_static(kind, attribute)
            if attribute.startswith("_") or attribute in inherited(kind) or isinstance(value, property):
                continue
            if callable(getattr(kind, attribute)):
                found[f"{name}.{attribute}"] = getattr(kind, attribute)
    return found


def parameters_of(name: str, function: Callable[..., Any]) -> set[str]:
    if name == "BltError":
        return set()
    found: set[str] = set()
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found |= set(NAMES)
        elif parameter.name != "self":
            found.add(parameter.name)
    return found


def test_every_public_method_and_parameter_is_in_the_table() -> None:
    found = {name: parameters_of(name, function) for name, function in public_callables().items()}
    assert found == {name: set(parameters) for name, parameters in PARAMETERS.items()}


def state(stream: Stream) -> dict[str, Any]:
    snapshot = stream.snapshot()
    arrays = {name: array.tobytes() for name, array in snapshot.arrays.items()}
    return {"position": snapshot.position, "patches": snapshot.patches, **arrays}


def use(result: Any) -> None:
    """Reads the beginning of what a generator yields, and ends what goes on."""
    if isinstance(result, GeneratorType):
        list(itertools.islice(result, 3))
    elif isinstance(result, CoroutineType | Scheduler):
        result.close()
    elif isinstance(result, Request):
        result.cancel()


def call(objects: dict[str, Any], name: str, parameter: str, value: Any) -> None:
    owner, _, method = name.partition(".")
    given = {n: p.given for n, p in PARAMETERS[name].items() if p.given is not inspect.Parameter.empty}
    given = {n: objects["Bundle"].path if isinstance(v, str) and v == "BUNDLE" else v for n, v in given.items()}
    if name == "Stream.restore":
        given["snapshot"] = objects["Snapshot"]
    target = getattr(objects[owner], method) if method else getattr(blt_runtime, owner)
    use(target(**{**given, parameter: value}))


def refusal(objects: dict[str, Any], name: str, parameter: str, value: Any) -> BltError | None:
    """The error that a call raises; any other than a BltError is a failure."""
    try:
        call(objects, name, parameter, value)
    except BltError as error:
        return error
    return None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [name for name, parameters in PARAMETERS.items() if parameters])
def test_wrong_types_are_refused_in_one_line_and_change_nothing(objects: dict[str, Any], name: str) -> None:
    stream: Stream = objects["Stream"]
    kept, before = stream.snapshot(), state(stream)
    for parameter, kind in PARAMETERS[name].items():
        for label, wrong in WRONG.items():
            value = iter([5]) if label == "iterator" else wrong
            value = CALLABLE.get(label, value) if parameter == "cancelled" else value
            where = f"{name}({parameter}={label})"
            error = refusal(objects, name, parameter, value)
            if error is None:
                assert kind.fits(value), f"{where} was accepted"
            else:
                assert str(error).isprintable(), where
                assert len(str(error)) < 400, where
                assert state(stream) == before or name == "Stream.score_ids", where
            if not kind.fits(value) and name not in OTHER_ERRORS and parameter != "patch_lengths":
                assert isinstance(error, UsageError), where
            stream.restore(kept)


def test_properties_raise_only_blt_errors(objects: dict[str, Any]) -> None:
    for name, owner in objects.items():
        for attribute in dir(type(owner)):
            if attribute not in FORMER and isinstance(inspect.getattr_static(type(owner), attribute), property):
                assert getattr(owner, attribute) is not None or (name, attribute) == ("Model", "hash_tables")


@pytest.mark.parametrize(
    "wrong", [7, np.array([1, 2]), [65, 66], memoryview(b"ab"), None, 1.5], ids=lambda x: type(x).__name__
)
def test_text_is_text_or_bytes(wrong: Any) -> None:
    """`bytes(7)` would be seven NULs, and an array its memory."""
    stream = model_of(SPEC).stream()
    with pytest.raises(UsageError, match=r"the text must be text \(str\) or bytes, not"):
        stream.append(wrong)
    with pytest.raises(UsageError, match=r"a stop string must be|stop must be"):
        GenerateOptions(stop=[wrong])
    assert stream.ids.tolist() == [BOS]


def test_numpys_numbers_are_numbers() -> None:
    stream = model_of(SPEC).stream(seed=np.int64(1))  # type: ignore[arg-type]
    plain = model_of(SPEC).stream(seed=1)
    made = stream.generate_ids(np.int64(9), temperature=np.float32(0.5), top_k=np.int16(7), stop_at_eos=np.bool_(False))  # type: ignore[arg-type]
    assert list(made) == list(plain.generate_ids(9, temperature=0.5, top_k=7, stop_at_eos=False))
    stream.rewind(np.uint8(3))  # type: ignore[arg-type]
    plain.rewind(3)
    assert stream.ids.tolist() == plain.ids.tolist()
    stream.append(bytearray(b"ab"))  # type: ignore[arg-type]
    stream.append_ids(np.array([5, 6], np.uint16))
    assert stream.ids[-4:].tolist() == [101, 102, 5, 6]


def test_patch_rules_hold_plain_numbers() -> None:
    rule = PatchRule("entropy", threshold=np.float64(1.5), max_patch_length=np.int64(4), monotonic=np.bool_(True))  # type: ignore[arg-type]
    assert rule == PatchRule("entropy", threshold=1.5, max_patch_length=4, monotonic=True)
    assert [type(value) for value in (rule.threshold, rule.max_patch_length, rule.monotonic)] == [float, int, bool]


def test_a_scheduler_refuses_more_streams_than_it_could_ever_run() -> None:
    for streams in (10**9, 2**70):
        with pytest.raises(UsageError, match="streams must be a whole number from 1 to"):
            Scheduler(model_of(SPEC), streams=streams)
