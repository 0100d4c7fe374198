"""Streams on the null backend: steps, chunks and rewinds all give the results of the slow reference."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blt_runtime import Model, PatchRule
from blt_runtime.backends.null import NullBackend, null_spec
from blt_runtime.bundle.spec import CacheKind, ModelSpec
from blt_runtime.errors import BackendError, CapacityError, InputError, UsageError
from blt_runtime.ids import BOS, EOS, encode
from blt_runtime.patching import patch_lengths
from blt_runtime.sampling import Sampler
from tests.runtime.null_reference import compute
from tests.runtime.streams import HASH, SPECS, assert_matches_reference, calls_of, model_of, random_ids, tables_for

ENTROPY = PatchRule("entropy", threshold=3.5)


specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


@specs
def test_steps_equal_the_reference(spec: ModelSpec) -> None:
    ids = random_ids(120)
    expected = compute(spec, ids, tables_for(spec))
    stream = model_of(spec).stream(bos=False)
    for t in range(len(ids)):
        stream.append_ids(ids[t : t + 1])
        np.testing.assert_array_equal(stream.logits, expected.logits[t].astype(np.float32))
    assert_matches_reference(stream, ids)


@specs
def test_any_chunking_equals_the_reference(spec: ModelSpec) -> None:
    rng = np.random.default_rng(3)
    ids = random_ids(200, seed=1)
    for _ in range(5):
        stream = model_of(spec).stream(bos=False)
        while stream.position < len(ids):
            stream.append_ids(ids[stream.position : stream.position + int(rng.choice([1, 2, 7, 40]))])
            assert_matches_reference(stream, ids[: stream.position])


@specs
def test_rewind_is_exact(spec: ModelSpec) -> None:
    rng = np.random.default_rng(4)
    ids = random_ids(150, seed=2)
    stream = model_of(spec).stream(bos=False)
    stream.append_ids(ids)
    for _ in range(25):
        stream.rewind(int(rng.integers(0, min(stream.position, rng.choice([5, 30, 150])))))
        ids = ids[: stream.position]
        assert_matches_reference(stream, ids)
        more = random_ids(int(rng.integers(1, 40)), seed=int(rng.integers(1000)))
        ids = np.concatenate([ids, more])
        stream.append_ids(more)
        assert_matches_reference(stream, ids)


@given(st.data())
@settings(max_examples=60)
def test_any_sequence_of_calls(data: st.DataObject) -> None:
    spec = data.draw(st.sampled_from(list(SPECS.values())))
    stream, ids = model_of(spec).stream(), np.array([BOS])
    for _ in range(data.draw(st.integers(1, 8))):
        if data.draw(st.booleans()):
            more = random_ids(data.draw(st.integers(0, 50)), seed=data.draw(st.integers(0, 99)))
            stream.append_ids(more)
            ids = np.concatenate([ids, more])
        else:
            stream.rewind(data.draw(st.integers(0, stream.position - 1)))
            ids = ids[: stream.position]
        assert_matches_reference(stream, ids)


def test_latent_calls_are_cut_to_their_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(100)
    spec = null_spec(chunk=64, slack=64)
    whole = model_of(spec)
    whole.score(ids)
    monkeypatch.setattr("blt_runtime.engine.prefill.GATHER_BYTES", 200)
    cut = model_of(spec)
    score = cut.score(ids)
    assert calls_of(cut)["latent"] > 2 * calls_of(whole)["latent"]
    np.testing.assert_array_equal(score.logits, compute(spec, ids, {}).logits.astype(np.float32))


def test_a_short_rewind_replays_only_the_tail() -> None:
    spec = null_spec(slack=32, chunk=8)
    model = model_of(spec)
    stream = model.stream()
    stream.append_ids(random_ids(300))
    before = dict(calls_of(model))
    stream.rewind(3)
    assert calls_of(model)["encoder"] - before["encoder"] <= 4
    before = dict(calls_of(model))
    stream.rewind(200)
    assert calls_of(model)["encoder"] - before["encoder"] >= 100 // 8


def test_the_latent_runs_once_per_complete_patch() -> None:
    spec = null_spec()
    model = model_of(spec)
    stream = model.stream()
    for id in random_ids(100)[1:]:
        stream.append_ids([id])
    assert calls_of(model)["latent"] == len(stream.patch_lengths) - 1
    assert calls_of(model)["entropy"] == calls_of(model)["decoder"] == 100


@specs
def test_score_returns_everything(spec: ModelSpec) -> None:
    ids = random_ids(90, seed=7)
    expected = compute(spec, ids, tables_for(spec))
    stream = model_of(spec).stream()
    score = stream.score_ids(ids)
    np.testing.assert_array_equal(score.entropies, expected.entropies)
    np.testing.assert_array_equal(score.patch_lengths, expected.patch_lengths)
    np.testing.assert_array_equal(score.logits, expected.logits.astype(np.float32))
    assert score.patch_lengths.sum() == 91
    assert stream.ids.tolist() == [BOS]


@specs
def test_forced_patch_lengths_override_the_rule(spec: ModelSpec) -> None:
    ids = random_ids(50, seed=8)
    lengths = np.array([1, 4, 20, 1, 1, 9, 10, 5])
    expected = compute(spec, ids, tables_for(spec), lengths)
    score = model_of(spec).score(ids, lengths)
    np.testing.assert_array_equal(score.patch_lengths, lengths)
    np.testing.assert_array_equal(score.logits, expected.logits.astype(np.float32))


@pytest.mark.parametrize("lengths", [[], [1, 5], [5], [1, 0, 4], [1.0, 4.0], [2, 3], [1, -1, 5]])
def test_bad_patch_lengths(lengths: list[float]) -> None:
    with pytest.raises(InputError, match="patch lengths"):
        model_of(null_spec()).score([1, 5, 6, 7], np.array(lengths))


def test_padded_patch_lengths_are_those_without_the_padding() -> None:
    score = model_of(null_spec()).score([1, 5, 6, 7], [1, 3, 1, 0, 0])
    assert score.patch_lengths.tolist() == [1, 3, 1]


def test_scoring_needs_ids() -> None:
    with pytest.raises(InputError, match="no ids"):
        model_of(null_spec()).score([])


@specs
def test_generation_equals_recomputing(spec: ModelSpec) -> None:
    stream = model_of(spec).stream()
    stream.append("Größe\x00\n\t x")
    prompt = stream.ids
    ids = np.array([*prompt, *stream.generate_ids(150, temperature=0, stop_at_eos=False)])
    expected = compute(spec, ids, tables_for(spec))
    assert expected.logits.argmax(axis=1)[len(prompt) - 1 : -1].tolist() == ids[len(prompt) :].tolist()
    assert_matches_reference(stream, ids)


def test_generation_stops_at_eos_only_with_stop_at_eos() -> None:
    model = model_of(null_spec())

    class Script(Sampler):
        ids = iter([9, 8, EOS, 7, 9, 8, EOS, 7])

        def __call__(self, logits_V: np.ndarray) -> int:
            return next(self.ids)

    script = Script(0.0)
    assert list(model.stream().generate_ids(4, sampler=script, stop_at_eos=False)) == [9, 8, EOS, 7]
    stream = model.stream()
    assert list(stream.generate_ids(4, sampler=script, stop_at_eos=True)) == [9, 8]
    assert stream.ids.tolist() == [BOS, 9, 8]


def test_generate_yields_one_piece_per_token() -> None:
    model = model_of(null_spec())
    ids = list(model.stream().generate_ids(40, temperature=0, stop_at_eos=False))
    pieces = list(model.stream().generate(40, temperature=0, stop_at_eos=False))
    assert pieces == [bytes([i - 4]) if i >= 4 else b"" for i in ids]


def test_stop_strings_cut_the_text() -> None:
    model = model_of(null_spec())
    whole = b"".join(model.stream().generate(40, temperature=0))
    stop = whole[10:13]
    at = whole.find(stop)
    stream = model.stream()
    assert b"".join(stream.generate(40, temperature=0, stop=[b"\x00never", stop])) == whole[:at]
    assert b"".join(model.stream().generate(12, temperature=0, stop=whole[10:14])) == whole[:12]


def test_seeds_repeat_and_differ() -> None:
    model = model_of(null_spec())

    def draw(seed: int | None, stream_seed: int | None = None) -> bytes:
        stream = model.stream(seed=stream_seed)
        return b"".join(stream.generate(60, temperature=5.0, seed=seed, stop_at_eos=False))

    assert draw(1) == draw(1) != draw(2)
    assert draw(None, 3) == draw(None, 3) != draw(None, 4)


def test_text_is_complete_characters() -> None:
    model = model_of(null_spec())
    pieces = list(model.generate_text("a", 60, temperature=0))
    raw = model.stream()
    raw.append("a")
    assert "".join(pieces) == b"".join(raw.generate(60, temperature=0)).decode("utf-8", errors="replace")


def test_reuse_after_more_input() -> None:
    stream = model_of(null_spec()).stream()
    list(stream.generate(20, temperature=0))
    stream.append(b"\xff\xfe more")
    assert_matches_reference(stream, stream.ids)
    list(stream.generate_ids(20, sampler=Sampler(1.0, seed=1), stop_at_eos=False))
    assert_matches_reference(stream, stream.ids)
    stream.reset()
    assert stream.ids.tolist() == [BOS]


def test_byte_capacity() -> None:
    stream = model_of(null_spec(capacity_bytes=40)).stream()
    stream.append(b"x" * 30)
    logits = stream.logits.copy()
    with pytest.raises(CapacityError, match="--capacity"):
        stream.append(b"y" * 10)
    np.testing.assert_array_equal(stream.logits, logits)
    stream.append(b"y" * 9)
    with pytest.raises(CapacityError, match="40"):
        next(stream.generate_ids(1, temperature=0, stop_at_eos=False))
    assert_matches_reference(stream, encode(b"x" * 30 + b"y" * 9))


@pytest.mark.parametrize("kind", ["ring", "window"])
@pytest.mark.parametrize("slack", [0, 40])
def test_patch_capacity_leaves_the_stream_as_it_was(kind: CacheKind, slack: int) -> None:
    spec = null_spec(capacity_patches=20, local_kind=kind, slack=slack)
    ids = random_ids(30)
    stream = model_of(spec).stream(bos=False)
    stream.append_ids(ids)
    with pytest.raises(CapacityError, match="20 patches"):
        stream.append_ids(random_ids(200, seed=9))
    assert_matches_reference(stream, ids)
    stream.append_ids([5, 6, 7])
    assert_matches_reference(stream, np.concatenate([ids, [5, 6, 7]]))


def test_patch_capacity_in_an_empty_stream_and_in_steps() -> None:
    stream = model_of(null_spec(PatchRule("byte"), capacity_patches=20, entropy=False)).stream(bos=False)
    with pytest.raises(CapacityError):
        stream.append_ids(random_ids(21))
    assert stream.position == 0
    stream.append_ids(random_ids(20))
    with pytest.raises(CapacityError):
        list(stream.generate_ids(1, temperature=0, stop_at_eos=False))
    assert_matches_reference(stream, random_ids(20))


def test_an_empty_stream_has_no_logits() -> None:
    stream = model_of(null_spec()).stream(bos=False)
    stream.append("")
    assert stream.patch_lengths.tolist() == [1]
    with pytest.raises(UsageError, match="empty"):
        stream.generate_ids(1, temperature=0, stop_at_eos=False)
    with pytest.raises(UsageError, match="empty"):
        stream.generate(1)


def test_bad_arguments() -> None:
    stream = model_of(null_spec()).stream()
    with pytest.raises(InputError, match=r"0\.\.259"):
        stream.append_ids([260])
    with pytest.raises(UsageError, match="whole numbers"):
        stream.append_ids([[1, 2]])
    with pytest.raises(UsageError, match="cannot rewind"):
        stream.rewind(2)
    with pytest.raises(UsageError, match="negative"):
        stream.generate(-1)
    with pytest.raises(UsageError, match="temperature"):
        stream.generate(1, temperature=-1)
    with pytest.raises(UsageError, match="seed"):
        stream.generate(1, seed=-1)
    with pytest.raises(UsageError, match="seed"):
        model_of(null_spec()).stream(seed=-1)


def test_two_threads_on_one_stream_are_refused() -> None:
    model = model_of(null_spec())
    stream = model.stream()
    entered, leave = threading.Event(), threading.Event()

    class Slow(Sampler):
        def __call__(self, logits_V: np.ndarray) -> int:
            entered.set()
            assert leave.wait(60)
            return super().__call__(logits_V)

    thread = threading.Thread(target=lambda: list(stream.generate_ids(1, sampler=Slow(0.0), stop_at_eos=False)))
    thread.start()
    assert entered.wait(60)
    with pytest.raises(UsageError, match="thread"):
        stream.append("x")
    leave.set()
    thread.join()
    stream.append("x")
    assert_matches_reference(stream, stream.ids)


def test_a_failed_call_requires_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = model_of(null_spec()).stream()

    def fail() -> None:
        raise BackendError("device lost")

    monkeypatch.setattr(stream._calls, "decoder", fail)
    with pytest.raises(BackendError, match="lost"):
        stream.append("x")
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"reset\(\)"):
        stream.append("x")
    stream.reset()
    stream.append("x")
    assert_matches_reference(stream, encode("x"))


def test_threads_share_a_model() -> None:
    model = model_of(null_spec(hash=HASH))
    results: list[list[int]] = []

    def work() -> None:
        results.append(list(model.stream().generate_ids(60, temperature=0, stop_at_eos=False)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [results[0]] * 4


def test_scores_follow_the_reference_where_a_delimiter_is_last() -> None:
    """Scheme bpe: a delimiter at the end closes no patch yet (spec section 5)."""
    spec = null_spec(PatchRule("bpe"))
    score = Model(spec, NullBackend(spec)).score([1, 5, 6, 7, 3])
    assert score.patch_lengths.tolist() == patch_lengths(spec.patch_rule, [1, 5, 6, 7, 3]).tolist() == [1, 5]
