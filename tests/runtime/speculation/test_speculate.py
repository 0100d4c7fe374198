"""Speculative decoding never shows: ids, logits and later results are those of plain decoding, whatever the drafts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blt_runtime import Stream
from blt_runtime.backends.null import null_spec
from blt_runtime.bundle.spec import CacheKind, CacheSpec, ModelSpec
from blt_runtime.engine.caches import CacheTrack
from blt_runtime.errors import BackendError, CapacityError, UsageError
from blt_runtime.ids import BOS, EOS, OFFSET, encode
from blt_runtime.patching import PatchRule
from blt_runtime.sampling import Sampler
from blt_runtime.speculation.drafters import (
    CoupledSampler,
    DecoderDrafter,
    Draft,
    Drafter,
    EntropyDrafter,
    FirstOf,
    LookupDrafter,
    Source,
)
from blt_runtime.speculation.speculate import Speculate, SpeculationStats
from tests.pairwise import pairwise
from tests.runtime.null_reference import compute
from tests.runtime.speculation.scripted import Oracle, Script
from tests.runtime.streams import SPECS, assert_matches_reference, calls_of, model_of, random_ids, tables_for

ALL = SPECS | {
    "byte": null_spec(PatchRule("byte"), capacity_patches=512, decoder_window=2),
    "byte, long": null_spec(PatchRule("byte"), slack=64, chunk=32, capacity_patches=512, encoder_window=3),
    "bpe": null_spec(PatchRule("bpe"), slack=32, chunk=16),
    "short patches, window": null_spec(PatchRule("static", patch_size=2), local_kind="window", slack=30, chunk=16),
    "latent window": null_spec(
        PatchRule("static", patch_size=2), local_kind="window", chunk=16, slack=20, latent=CacheSpec("window", 9, 4, 1)
    ),
    "latent window, tight": null_spec(
        PatchRule("byte"), local_kind="window", slack=20, capacity_patches=512, latent=CacheSpec("window", 4, 4, 1)
    ),
    "latent ring": null_spec(PatchRule("static", patch_size=2), chunk=16, slack=20, latent=CacheSpec("ring", 11, 4, 1)),
    "level and rise": null_spec(PatchRule("entropy", threshold=2.0, threshold_add=0.1), decoder_window=3, chunk=16),
}
specs = pytest.mark.parametrize("spec", ALL.values(), ids=ALL.keys())
PROMPT = "Größe\x00\n\t x"


@pytest.mark.parametrize(
    ("name", "right", "source"), pairwise(tuple(ALL), (0.0, 0.7, 0.95, 1.0), (None, "entropy", "decoder"))
)
def test_every_byte_leaves_the_stream_of_plain_decoding(name: str, right: float, source: Source | None) -> None:
    spec = ALL[name]
    ids = random_ids(60, seed=3)
    stream = model_of(spec).stream()
    made = []
    oracle = Oracle(ids, 1, right, source)
    expected = compute(spec, np.array([BOS, *ids]), tables_for(spec))
    for id in stream.generate_ids(len(ids), sampler=Script(ids), stop_at_eos=False, speculate=oracle, draft=9):
        made.append(id)
        assert stream.ids.tolist() == [BOS, *made]
        assert stream.patch_lengths.sum() == stream.position + 1
        np.testing.assert_array_equal(stream.logits, expected.logits[len(made)].astype(np.float32))
    assert_matches_reference(stream, np.array([BOS, *ids]))
    assert made == ids.tolist()


@given(st.data())
@settings(max_examples=40)
def test_any_interruption(data: st.DataObject) -> None:
    """Between two ids the stream may be rewound, append text or run another generation."""
    spec = data.draw(st.sampled_from(list(ALL.values())))
    ids = random_ids(60, seed=data.draw(st.integers(0, 50)))
    stream, text = model_of(spec).stream(), [BOS]
    right = data.draw(st.sampled_from([0.7, 0.95, 1.0]))
    sources: list[Source | None] = [None, "entropy", "decoder"]
    source = data.draw(st.sampled_from(sources))
    oracle = Oracle(ids, 1, right, source, data.draw(st.integers(0, 50)))
    draft = data.draw(st.integers(1, 20))
    for i, id in enumerate(
        stream.generate_ids(len(ids), sampler=Script(ids), stop_at_eos=False, speculate=oracle, draft=draft)
    ):
        text.append(id)
        event = data.draw(st.sampled_from(["none"] * 6 + ["rewind", "append", "there and back", "again"]))
        if event == "rewind":
            back = data.draw(st.integers(1, len(text) - 1))
            stream.rewind(back)
            text = text[:-back]
        elif event == "append":
            more = random_ids(data.draw(st.integers(1, 12)), seed=data.draw(st.integers(0, 50)))
            stream.append_ids(more)
            text += more.tolist()
        elif event == "there and back":
            stream.append_ids([id, 7, 8])
            stream.rewind(3)
        elif event == "again":
            other = random_ids(5, seed=i)
            text += stream.generate_ids(
                5, sampler=Script(other), stop_at_eos=False, speculate=Oracle(other, len(text), 0.9), draft=3
            )
        oracle.start = len(text) - i - 1
        assert_matches_reference(stream, np.array(text))


@specs
@pytest.mark.parametrize("how", ["lookup", "decoder", "lookup+decoder", "entropy", "auto"])
def test_named_drafters_change_nothing(spec: ModelSpec, how: Speculate) -> None:
    plain, speculating = model_of(spec).stream(), model_of(spec).stream()
    for stream in (plain, speculating):
        stream.append(PROMPT * 3)
    if how == "entropy" and not spec.patch_rule.needs_entropy:
        with pytest.raises(UsageError, match="choose 'decoder'"):
            speculating.generate_ids(1, temperature=0, stop_at_eos=False, speculate=how)
        return
    assert list(speculating.generate_ids(100, temperature=0, stop_at_eos=False, speculate=how)) == list(
        plain.generate_ids(100, temperature=0, stop_at_eos=False)
    )
    assert_matches_reference(speculating, plain.ids)
    assert speculating.speculation.tokens == 100


@pytest.mark.parametrize("source", [None, "decoder"])
def test_accepted_drafts_save_calls(source: Source | None) -> None:
    """All accepted, 15 at once, patches of 4: 16 tokens a round, four patches in its latent call."""
    spec = null_spec(PatchRule("static", patch_size=4), slack=600, local_kind="linear", chunk=64)
    ids = random_ids(160, seed=4) % 128 + 128
    model = model_of(spec)
    stream = model.stream()
    before = dict(calls_of(model))
    drafter = Oracle(ids, 1, 1.0, source)
    drafter.sure = True
    list(stream.generate_ids(160, sampler=Script(ids), stop_at_eos=False, speculate=drafter, draft=15))
    used, stats = {name: calls_of(model)[name] - before[name] for name in before}, stream.speculation
    assert stats.passes == stats.latent_calls == used["latent"] == 10
    assert stats.accepted == stats.drafts == 150
    assert used == {name: getattr(stats, f"{name}_calls") for name in used}
    assert used["entropy"] == 0
    drafted = 150 if source == "decoder" else 0
    assert used["encoder"] == 10 + drafted
    assert used["decoder"] == 10 + drafted


def test_the_decoders_drafts_are_all_accepted_before_a_boundary() -> None:
    """There its drafts are its own choices, and only the entropy model reads them, all in one call."""
    spec = null_spec(PatchRule("entropy", threshold=9.0), slack=600, local_kind="linear", chunk=64)
    model = model_of(spec)
    stream = model.stream()
    before = dict(calls_of(model))
    sampler = Sampler(0.7, seed=0)
    list(stream.generate_ids(90, sampler=sampler, stop_at_eos=False, speculate=DecoderDrafter(0.0, sampler), draft=8))
    used = {name: calls_of(model)[name] - before[name] for name in before}
    assert stream.speculation.accepted == stream.speculation.drafts >= 80 - 3
    assert used["encoder"] in range(90, 100)
    assert used["decoder"] in range(90, 100)
    assert used["entropy"] == stream.speculation.passes <= 12
    assert used["latent"] == 0


def test_the_entropy_model_reads_no_byte_twice_while_its_drafts_are_accepted() -> None:
    spec = null_spec(PatchRule("entropy", threshold=4.0), slack=600, local_kind="linear", chunk=64)
    ids = random_ids(100, seed=5)
    ids[ids == EOS] = 50
    most_reads: dict[Source | None, int] = {"entropy": 101, None: 40, "decoder": 40}
    for source, most in most_reads.items():
        model = model_of(spec)
        stream = model.stream()
        before = calls_of(model)["entropy"]
        list(
            stream.generate_ids(
                100, sampler=Script(ids), stop_at_eos=False, speculate=Oracle(ids, 1, 1.0, source), draft=8
            )
        )
        assert calls_of(model)["entropy"] - before <= most


def test_calls_are_bound_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = model_of(null_spec(slack=64, chunk=32)).stream()
    ids = random_ids(200, seed=6)
    list(stream.generate_ids(100, sampler=Script(ids), stop_at_eos=False, speculate=Oracle(ids, 1, 0.9), draft=4))
    monkeypatch.setattr("blt_runtime.engine.memory.Graph.bind", lambda *_, **__: pytest.fail("bound again"))
    monkeypatch.setattr("blt_runtime.engine.memory.Graph.new", lambda *_, **__: pytest.fail("allocated"))
    list(stream.generate_ids(50, sampler=Script(ids[100:]), stop_at_eos=False, speculate=Oracle(ids, 1, 0.9), draft=4))


@pytest.mark.parametrize("how", ["lookup", "off"])
def test_repetition_is_looked_up(how: Speculate) -> None:
    spec = null_spec(slack=64, chunk=32, capacity_bytes=2048, capacity_patches=2048)
    ids = encode(b"a sentence that comes again and again. " * 12, bos=False)
    stream = model_of(spec).stream()
    assert list(stream.generate_ids(len(ids), sampler=Script(ids), stop_at_eos=False, speculate=how)) == ids.tolist()
    assert (stream.speculation.accepted > 200) == (how == "lookup")


def test_stop_strings_eos_and_limits_end_the_text_where_plain_decoding_ends_it() -> None:
    ids = encode(b"abcdefghijkl", bos=False)
    spec = null_spec(slack=64, chunk=32)
    stream = model_of(spec).stream()
    speculating = stream.generate_ids(5, sampler=Script(ids), stop_at_eos=False, speculate=Oracle(ids, 1, 1.0))
    assert list(speculating) == ids[:5].tolist()
    assert_matches_reference(stream, np.array([BOS, *ids[:5]]))

    ended = ids.copy()
    ended[7] = EOS
    stream.reset()
    assert (
        list(stream.generate_ids(12, sampler=Script(ended), stop_at_eos=True, speculate=Oracle(ended, 1, 1.0)))
        == ended[:7].tolist()
    )
    assert_matches_reference(stream, np.array([BOS, *ended[:7]]))

    whole = b"".join(model_of(spec).stream().generate(60, temperature=0))
    plain, stream = model_of(spec).stream(), model_of(spec).stream()
    expected = list(plain.generate(60, temperature=0, stop=whole[10:13]))
    assert list(stream.generate(60, temperature=0, stop=whole[10:13], speculate="auto")) == expected
    assert_matches_reference(stream, plain.ids)


@pytest.mark.parametrize("kind", ["ring", "window", "linear"])
@pytest.mark.parametrize("source", [None, "entropy", "decoder"])
def test_capacity_ends_where_plain_decoding_ends(kind: CacheKind, source: Source | None) -> None:
    limits: tuple[dict[str, Any], ...] = ({"capacity_bytes": 40}, {"capacity_patches": 9})
    for limit in limits:
        spec = null_spec(**limit, local_kind=kind, slack=600 if kind == "linear" else 30)
        ids = random_ids(200, seed=11)
        ends = []
        for speculate in ("off", Oracle(ids, 1, 0.9, source)):
            stream = model_of(spec).stream()
            with pytest.raises(CapacityError):
                list(stream.generate_ids(200, sampler=Script(ids), stop_at_eos=False, speculate=speculate))
            assert_matches_reference(stream, stream.ids)
            ends.append(stream.position)
        assert ends[0] == ends[1]


def test_a_failed_pass_requires_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = model_of(null_spec(slack=64, chunk=32)).stream()
    ids = random_ids(40, seed=12)

    def fail(*_: object) -> None:
        raise BackendError("device lost")

    monkeypatch.setattr("blt_runtime.speculation.speculate.Graphs.decode", fail)
    with pytest.raises(BackendError):
        list(stream.generate_ids(40, sampler=Script(ids), stop_at_eos=False, speculate=Oracle(ids, 1, 1.0)))
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"reset\(\)"):
        stream.append("x")
    stream.reset()
    assert (
        list(stream.generate_ids(40, sampler=Script(ids), stop_at_eos=False, speculate=Oracle(ids, 1, 1.0)))
        == ids.tolist()
    )
    assert_matches_reference(stream, np.array([BOS, *ids]))


def test_bad_arguments() -> None:
    stream = model_of(null_spec()).stream()
    with pytest.raises(UsageError, match="did you mean 'lookup'"):
        stream.generate_ids(1, temperature=0, stop_at_eos=False, speculate="lokup")  # type: ignore[arg-type]
    for draft in (0, -1, 1.5, True):
        with pytest.raises(UsageError, match="draft"):
            stream.generate_ids(1, temperature=0, stop_at_eos=False, speculate="auto", draft=draft)  # type: ignore[arg-type]


def test_former_names_of_the_counts_warn() -> None:
    stats = SpeculationStats(drafts=5, accepted=3)
    with pytest.warns(DeprecationWarning, match="now drafts"):
        assert stats.guesses == 5
    with pytest.warns(DeprecationWarning, match="now accepted"):
        assert stats.right == 3
    assert stats.acceptance_rate == 0.6
    assert SpeculationStats().acceptance_rate == 0.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", ["auto", "decoder", "entropy", "lookup", "lookup+decoder"])
def test_named_drafters_keep_the_seeded_text(how: Speculate, seed: int) -> None:
    """The sampler draws for every byte from the target's logits, as it does without drafts."""
    spec = null_spec(slack=64, chunk=32)
    settings: dict[str, Any] = {"temperature": 0.3, "top_p": 0.9, "seed": seed, "stop_at_eos": False}
    plain, stream = model_of(spec).stream(), model_of(spec).stream()
    expected = list(plain.generate(120, **settings))
    assert list(stream.generate(120, **settings, speculate=how)) == expected


def test_a_coupled_choice_is_the_samplers_own() -> None:
    """With the same logits the draft is the id that will be drawn, wherever drafts begin, whichever are left out."""
    rng = np.random.default_rng(2)
    logits_NV = rng.normal(size=(40, 12)) * 2
    sampler = Sampler(0.8, top_k=9, seed=4)
    coupled, position = CoupledSampler(sampler), 0
    while position < 40:
        ahead = position + rng.permutation(6)[:3]
        coupled.begin(position)
        drafts = {n: coupled(n, logits_NV[n]) for n in sorted(ahead.tolist()) if n < 40}
        for _ in range(min(4, 40 - position)):
            drawn = sampler(logits_NV[position])
            assert drafts.get(position, drawn) == drawn
            position += 1


class TestLookup:
    def test_the_newest_occurrence_wins(self) -> None:
        ids = encode(b"abcX abcY abc", bos=False)
        assert LookupDrafter(100, length=3).propose(ids, 3) == encode(b"Y a", bos=False).tolist()

    def test_a_period_continues(self) -> None:
        ids = encode(b"xyxyxy", bos=False)
        assert LookupDrafter(100, length=3).propose(ids, 7) == encode(b"xyxyxyx", bos=False).tolist()

    def test_nothing_is_found(self) -> None:
        drafter = LookupDrafter(100, length=3)
        assert list(drafter.propose(encode(b"ab", bos=False), 3)) == []
        assert list(drafter.propose(encode(b"abcdef", bos=False), 3)) == []

    def test_growing_text_equals_a_fresh_search(self) -> None:
        rng = np.random.default_rng(0)
        ids, drafter = rng.integers(4, 7, 400), LookupDrafter(400, length=4)
        end = 0
        while end < 395:
            end += int(rng.integers(1, 6))
            found = list(drafter.propose(ids[:end], 5))
            fresh = list(LookupDrafter(400, length=4).propose(ids[:end], 5))
            assert found == fresh

    def test_outdated_entries_are_not_used(self) -> None:
        drafter = LookupDrafter(100, length=3)
        drafter.propose(encode(b"abcdefgh abc", bos=False), 4)
        assert list(drafter.propose(encode(b"xxxxxxxxxxxx abc", bos=False), 4)) == []


def test_first_of_tries_drafters_in_order() -> None:
    ids, logits = encode(b"ababab", bos=False), 9 * np.eye(260)[9]
    both = FirstOf(LookupDrafter(100, length=2), EntropyDrafter(confidence=0.9))
    assert both.source == "entropy"
    assert list(both.propose(ids, 2)) == encode(b"ab", bos=False).tolist()
    assert list(both.propose(encode(b"xyz", bos=False), 2)) == []
    assert both.extend(ids, logits) == (9, None)
    assert both.extend(ids, 0.5 * logits) is None


@pytest.mark.parametrize("capacity", [8, 11, 20])
@pytest.mark.parametrize("kind", ["ring", "window", "linear"])
def test_room_is_exactly_what_can_be_rolled_back(kind: CacheKind, capacity: int) -> None:
    for crosses in (True, False) if kind != "window" else (False,):
        spec = CacheSpec(kind, 200 if kind == "linear" else capacity, 8, 1)
        for position in range(1, 60):
            room = CacheTrack(spec, crosses).room(position, 0)
            for more in range(1, 25):
                track = CacheTrack(spec, crosses)
                track.wrote(position + more, 0)
                exact = all(track.can_resume(position + back, 0) for back in range(more + 1))
                assert exact or more > room, (position, more, room)
                if kind != "ring" or position >= capacity:  # a ring that is not full yet could take more
                    assert exact == (more <= room), (position, more, room)


class TestVerify:
    """Leviathan's rule: whatever distribution the draft was drawn from, the result is distributed as the target."""

    def test_two_symbols_exactly(self) -> None:
        """Over the grid of the rule's own draws, the shares are p, to the grid's width."""
        p, q, n = np.array([0.3, 0.7]), np.array([0.8, 0.2]), 1000
        logits, counts = np.log(p), np.zeros(2)
        for draft in (0, 1):
            for u in (np.arange(n) + 0.5) / n:
                sampler = Sampler(1.0)
                draws = iter([u, 0.5])
                sampler._random = type("Grid", (), {"random": lambda self, d=draws: next(d)})()
                counts[sampler.verify(logits, draft, q)] += q[draft] / n
        np.testing.assert_allclose(counts, p, atol=1.5 / n)

    @pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 0.4}])
    def test_trimmed_distributions(self, settings: dict[str, Any]) -> None:
        rng = np.random.default_rng(1)
        logits, other = rng.normal(size=6), rng.normal(size=6)
        sampler = Sampler(**{"temperature": 1.0, **settings}, seed=2)
        counts, n = np.zeros(6), 20_000
        for _ in range(n):
            counts[sampler.verify(logits, *sampler.draft(other))] += 1
        expected = n * sampler.probabilities(logits)
        assert (counts[expected == 0] == 0).all()
        kept = expected > 0
        chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
        assert chi_square < 25  # 5 degrees of freedom at most: exceeded once in 7,000

    def test_equal_distributions_accept_every_draft(self) -> None:
        sampler, logits = Sampler(0.7, seed=3), np.random.default_rng(4).normal(size=OFFSET + 256)
        for _ in range(200):
            id, q_V = sampler.draft(logits)
            assert sampler.verify(logits, id, q_V) == id

    def test_probabilities_are_those_of_the_draws(self) -> None:
        logits = np.array([0.0, 2.0, 1.0, -1.0])
        assert Sampler(0.0).probabilities(logits).tolist() == [0, 1, 0, 0]
        assert Sampler(1.0, top_k=2).probabilities(logits)[[0, 3]].tolist() == [0, 0]
        assert Sampler(1.0).probabilities(logits).sum() == pytest.approx(1)


def test_sampled_text_has_the_targets_distribution() -> None:
    """Pairs of ids generated with drawn drafts against the exact probabilities of both."""
    spec = null_spec(PatchRule("entropy", threshold=4.99), slack=64, chunk=32)
    stream = model_of(spec).stream()
    sampler = Sampler(0.15, top_k=3, seed=5)

    def exact() -> dict[tuple[int, int], float]:
        out: dict[tuple[int, int], float] = {}
        first = sampler.probabilities(stream.logits).copy()
        for a in np.flatnonzero(first).tolist():
            stream.append_ids([a])
            second = sampler.probabilities(stream.logits)
            out |= {(a, b): first[a] * second[b] for b in np.flatnonzero(second).tolist()}
            stream.rewind(1)
        return out

    expected = exact()
    drafter: Drafter = Drawn(stream, sampler, sorted({b for _, b in expected}))
    counts = dict.fromkeys(expected, 0)
    n = 2000
    for _ in range(n):
        first, second = stream.generate_ids(2, sampler=sampler, stop_at_eos=False, speculate=drafter)
        counts[first, second] += 1
        stream.rewind(2)
    chi_square = sum((counts[k] - n * p) ** 2 / (n * p) for k, p in expected.items())
    assert len(expected) == 9
    assert chi_square < 30  # 8 degrees of freedom: exceeded once in 5,000
    assert stream.speculation.accepted > n / 20


class Drawn(Drafter):
    """Draws drafts among given ids from its own lopsided distribution."""

    source = "entropy"

    def __init__(self, stream: Stream, sampler: Sampler, ids: list[int]) -> None:
        self._q = np.zeros(stream.spec.vocab_size)
        self._q[ids] = np.arange(1, len(ids) + 1) / sum(range(1, len(ids) + 1))
        self._random = np.random.default_rng(6)

    def extend(self, ids_N: np.ndarray, logits_V: np.ndarray) -> Draft | None:
        return int(self._random.choice(len(self._q), p=self._q)), self._q
