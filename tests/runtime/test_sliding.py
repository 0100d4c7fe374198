"""A stream that slides always equals a fresh stream that has read the newest part of the text."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blt_runtime import PatchRule, Stream
from blt_runtime.backends.null import NullBackend, null_spec
from blt_runtime.bundle.spec import ModelSpec
from blt_runtime.engine.prefill import Prefill
from blt_runtime.errors import Cancelled, CapacityError, UsageError
from blt_runtime.ids import BOS, OFFSET, encode
from blt_runtime.sampling import Sampler
from blt_runtime.speculation.drafters import LookupDrafter
from blt_runtime.speculation.speculate import Speculate
from tests.pairwise import pairwise
from tests.runtime.streams import SPECS, assert_matches_reference, model_of, random_ids

LIMITS = {"capacity_bytes": 64, "capacity_patches": 20}


def is_filled(case: tuple[Any, ...]) -> bool:
    """Patches that are too long never use up the capacity in patches."""
    name, limit = case[:2]
    return limit == "capacity_bytes" or name not in ("huge patches", "long patches")


def limited(name: str, limit: str) -> ModelSpec:
    return replace(SPECS[name], **cast(Any, {limit: LIMITS[limit]}))


SMALL = {f"{case[0]}, {case[1]}": limited(*case) for case in itertools.product(SPECS, LIMITS) if is_filled(case)}
small = pytest.mark.parametrize("spec", SMALL.values(), ids=SMALL.keys())


def slides(spec: ModelSpec, bos: bool = True) -> Stream:
    return model_of(spec).stream(bos=bos, overflow="slide")


def assert_holds(stream: Stream, text_N: np.ndarray, bos: bool = True) -> None:
    """`stream` holds the newest part of `text_N`, counts the rest as forgotten, and equals a fresh stream with it."""
    rest_N = text_N[stream.forgotten :]
    assert_matches_reference(stream, np.concatenate([[BOS], rest_N]) if bos else rest_N)
    assert stream.position + stream.forgotten == len(text_N) + bos
    assert stream.position <= stream.spec.capacity_bytes
    assert len(stream.patch_lengths) - 1 <= stream.spec.capacity_patches


@pytest.mark.parametrize(
    ("name", "limit", "bos"), pairwise(tuple(SPECS), tuple(LIMITS), (True, False), allowed=is_filled)
)
def test_single_tokens(name: str, limit: str, bos: bool) -> None:
    spec = limited(name, limit)
    stream, text_N, times = slides(spec, bos), random_ids(140, seed=11), 0
    for t in range(len(text_N)):
        before = stream.forgotten
        stream.append_ids(text_N[t : t + 1])
        times += stream.forgotten > before
        assert_holds(stream, text_N[: t + 1], bos)
    assert times >= 2


@small
def test_pieces_of_all_lengths(spec: ModelSpec) -> None:
    rng = np.random.default_rng(6)
    stream, text_N = slides(spec), np.zeros(0, np.int64)
    for n in rng.choice([1, 2, 9, 40, 63, 64, 65, 150, 700], 25):
        more_N = random_ids(int(n), seed=int(n))
        stream.append_ids(more_N)
        text_N = np.concatenate([text_N, more_N])
        assert_holds(stream, text_N)
    assert stream.forgotten > 1000


def test_the_half_that_is_kept() -> None:
    stream = slides(null_spec(PatchRule("static", patch_size=9), capacity_bytes=41))
    text = b"0123456789" * 5
    stream.append(text[:40])
    assert (stream.position, stream.forgotten) == (41, 0)  # BOS and 40 bytes fill it
    stream.append(text[40:41])
    assert (stream.position, stream.forgotten) == (21, 21)  # 41 bytes are more than 40: the newest 20
    assert stream.ids.tolist() == encode(text[21:41]).tolist()
    stream.append(text)  # of 70 bytes again the newest 20
    assert stream.ids.tolist() == encode(text[-20:]).tolist()
    assert stream.forgotten == 71


def test_it_begins_with_a_whole_character() -> None:
    spec = null_spec(PatchRule("static", patch_size=9), capacity_bytes=40)
    for shift in range(4):
        stream = slides(spec)
        stream.append("x" * shift + "\N{ROCKET}" * 30)
        assert (stream.ids[1:] - OFFSET).astype(np.uint8).tobytes().decode() == "\N{ROCKET}" * 4
    stream = slides(spec)
    stream.append(b"\x80" * 60)  # no characters at all: nothing to look for
    assert stream.position == 1 + 19


def test_a_long_text_is_not_read_before_it_is_forgotten() -> None:
    stream = slides(null_spec(capacity_bytes=64, chunk=8))
    backend = stream._owner
    assert isinstance(backend, NullBackend)
    calls = backend.calls
    before = calls["entropy"]
    stream.append(b"x" * 100_000)
    assert calls["entropy"] - before <= 1 + 31 // 8 + 2
    assert stream.forgotten == 100_000 - 31


@small
def test_a_slide_reads_no_more_than_it_forgets(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    read, run = [], Prefill.run

    def counted(self: Prefill, ids_N: np.ndarray, **options: Any) -> np.ndarray:
        read.append(len(ids_N))
        return run(self, ids_N, **options)

    monkeypatch.setattr(Prefill, "run", counted)
    stream, text_N = slides(spec), random_ids(1000, seed=2)
    for id in text_N:
        stream.append_ids([id])
    assert stream.forgotten > 900
    assert 0 < sum(read) <= stream.forgotten


@pytest.mark.parametrize(
    ("name", "limit", "speculate"),
    pairwise(tuple(SPECS), tuple(LIMITS), ("entropy", "lookup", "auto"), allowed=is_filled),
)
def test_speculative_generation_is_the_same(name: str, limit: str, speculate: Speculate) -> None:
    spec = limited(name, limit)
    if speculate == "entropy" and not spec.patch_rule.needs_entropy:
        speculate = "lookup"
    plain, ahead = slides(spec), slides(spec)
    for stream in (plain, ahead):
        stream.append(b"abcabc" * 3)
    text = list(plain.generate_ids(200, temperature=0, stop_at_eos=False))
    assert list(ahead.generate_ids(200, temperature=0, stop_at_eos=False, speculate=speculate, draft=6)) == text
    assert ahead.forgotten == plain.forgotten > 100
    assert_holds(ahead, np.concatenate([encode(b"abcabc" * 3, bos=False), text]))


def test_lookups_find_the_text_that_a_slide_kept() -> None:
    text_N = random_ids(200, seed=9)
    drafter = LookupDrafter(256)
    drafter.propose(text_N, 4)
    held_N = np.concatenate([text_N[100:], text_N[120:130]])  # the half that is kept, and some of it again
    assert drafter.propose(held_N, 4) == text_N[130:134].tolist()


def test_every_generated_token_is_yielded_once_and_stops_work() -> None:
    spec = null_spec(capacity_bytes=64)
    large = model_of(null_spec()).stream()
    assert len(list(model_of(spec).generate_text("a", 300, temperature=0, overflow="slide"))) > 100
    stream = slides(spec)
    made = b"".join(stream.generate(200, temperature=1.0, seed=1, stop_at_eos=False))
    first = b"".join(large.generate(40, temperature=1.0, seed=1, stop_at_eos=False))
    assert made.startswith(first)  # nothing differs before the first slide
    assert stream.forgotten + stream.position == 201


@small
def test_rewinding_stays_within_the_tokens_held(spec: ModelSpec) -> None:
    stream, text_N = slides(spec), random_ids(300, seed=3)
    stream.append_ids(text_N)
    for n in (1, 5, 12):
        n = min(n, stream.position - 1)
        stream.rewind(n)
        text_N = text_N[: len(text_N) - n]
        assert_holds(stream, text_N)
    with pytest.raises(UsageError, match=f"the {stream.forgotten} before them are forgotten"):
        stream.rewind(stream.position + 1)
    more_N = random_ids(90, seed=4)
    stream.append_ids(more_N)
    assert_holds(stream, np.concatenate([text_N, more_N]))


def test_a_rewound_bos_does_not_count_as_text() -> None:
    """Without its BOS a stream holds only text; the next slide begins with BOS again."""
    stream = slides(null_spec(capacity_bytes=40))
    stream.rewind(1)
    stream.append(b"x" * 60)
    assert stream.ids.tolist() == encode(b"x" * 19).tolist()
    assert stream.forgotten == 60 - 19


@small
def test_snapshots_remember_what_was_forgotten(spec: ModelSpec) -> None:
    stream, text_N = slides(spec), random_ids(400, seed=5)
    stream.append_ids(text_N[:150])
    model = model_of(spec)
    one, other = model.stream(overflow="slide"), model.stream(overflow="slide")
    one.append_ids(text_N[:150])
    assert one.forgotten == stream.forgotten > 0
    other.restore(one.snapshot())
    for t in range(150, 400):
        other.append_ids(text_N[t : t + 1])
    assert_holds(other, text_N)
    other.reset()
    assert (other.forgotten, other.ids.tolist()) == (0, [BOS])


def test_cancelling_a_slide_restores_everything() -> None:
    spec = null_spec(capacity_bytes=64, chunk=8)
    stream, text_N = slides(spec), random_ids(200, seed=6)
    stream.append_ids(text_N[:110])
    forgotten = stream.forgotten
    asked = iter([False] * 3 + [True])
    with pytest.raises(Cancelled):
        stream.append_ids(text_N[110:], cancelled=lambda: next(asked))
    assert stream.forgotten == forgotten
    assert_holds(stream, text_N[:110])
    stream.append_ids(text_N[110:])
    assert_holds(stream, text_N)


@given(st.data())
@settings(max_examples=60)
def test_any_sequence_of_calls(data: st.DataObject) -> None:
    spec = data.draw(st.sampled_from(list(SMALL.values())))
    bos = data.draw(st.booleans())
    stream, text_N = slides(spec, bos), np.zeros(0, np.int64)
    for _ in range(data.draw(st.integers(1, 10))):
        kind = data.draw(st.sampled_from(["append", "append", "generate", "rewind"]))
        if kind == "append" or not stream.position:
            more_N = random_ids(data.draw(st.integers(1, 150)), seed=data.draw(st.integers(0, 99)))
            stream.append_ids(more_N)
            text_N = np.concatenate([text_N, more_N])
        elif kind == "generate":
            modes: list[Speculate] = ["off", "lookup"]
            speculate = data.draw(st.sampled_from(modes))
            made = stream.generate_ids(
                data.draw(st.integers(1, 50)), sampler=Sampler(2.0, seed=1), stop_at_eos=False, speculate=speculate
            )
            text_N = np.concatenate([text_N, list(made)]).astype(np.int64)
        else:
            n = data.draw(st.integers(0, stream.position - 1))
            stream.rewind(n)
            text_N = text_N[: len(text_N) - n]
        assert_holds(stream, text_N, bos)


def test_only_streams_with_overflow_slide_slide() -> None:
    spec = null_spec(capacity_bytes=40)
    with pytest.raises(CapacityError):
        model_of(spec).stream().append(b"x" * 40)
    with pytest.raises(CapacityError):
        list(model_of(spec).stream().generate_ids(60, temperature=0, stop_at_eos=False))
    with pytest.raises(UsageError, match="did you mean 'slide'"):
        model_of(spec).stream(overflow="slides")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="too small"):
        model_of(null_spec(capacity_patches=1)).stream(overflow="slide")
    with pytest.raises(CapacityError):
        slides(spec).score_ids(random_ids(41))


def test_the_smallest_capacities() -> None:
    for patches, size, bos in ((2, 512, True), (1, 512, False), (256, 8, True), (3, 9, True)):
        spec = replace(null_spec(chunk=4, slack=2, window=3), capacity_patches=patches, capacity_bytes=size)
        stream, text_N = slides(spec, bos), random_ids(100, seed=8)
        for t in range(len(text_N)):
            stream.append_ids(text_N[t : t + 1])
        assert_holds(stream, text_N, bos)
        stream.append_ids(text_N)
        assert_holds(stream, np.concatenate([text_N, text_N]), bos)
