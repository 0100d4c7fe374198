"""Adaptive drafting: calls that take made-up times, drafts that are accepted or rejected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from blt_runtime.ids import encode
from blt_runtime.sampling import Sampler
from blt_runtime.speculation.adaptive import MIN_TIMINGS, AdaptiveDrafter, CallTime, Costs, LeastTime, Mode, Rate
from blt_runtime.speculation.drafters import LookupDrafter

TEXT = encode(b"again and again and again and ", bos=False)


class Always(LookupDrafter):
    """Proposes as many ids as it may."""

    def propose(self, ids_N: np.ndarray, limit: int) -> Sequence[int]:
        return [42] * limit


def costs_of(**one: float) -> Costs:
    """Calls that take so long for one token or patch, and a twentieth for each more."""
    costs = Costs()
    for name, times in costs.of.items():
        for n in (1, 3) * MIN_TIMINGS:
            times.note(n, one.get(name, 1.0) * (1 + 0.05 * (n - 1)))
    return costs


def adaptive(**one: float) -> AdaptiveDrafter:
    return AdaptiveDrafter(Always(100), costs_of(**one), with_entropy=True)


def play(drafter: AdaptiveDrafter, rounds: int, accepted: dict[Mode, int], probability: float = 0.9) -> list[Mode]:
    """Plays rounds in which the first so many drafts of each mode are accepted. Returns the mode of each round."""
    modes: list[Mode] = []
    for _ in range(rounds):
        made = len(drafter.propose(TEXT, 8))
        mode: Mode = drafter.source or ("lookup" if made else "plain")
        while drafter.source and made < 8:
            if drafter.extend(np.append(TEXT, [42] * made), logits(probability)) is None:
                break
            made += 1
        costs = drafter._costs
        costs.round_seconds += costs.plain + sum(costs.draft(mode, number) for number in range(1, made + 1))
        for place in range(made):
            drafter.settle(len(TEXT) + place, place < accepted.get(mode, 0))
            if place >= accepted.get(mode, 0):
                break
        modes.append(mode)
    return modes


def logits(probability: float) -> np.ndarray:
    """Logits of 260 ids, of which 42 has that probability."""
    out = np.full(260, math.log((1 - probability) / 259))
    out[42] = math.log(probability)
    return out


def test_a_least_time_rises_slowly() -> None:
    cost = LeastTime()
    cost.note(2.0)
    cost.note(9.0)
    assert 2.0 < cost.seconds < 2.1
    cost.note(1.0)
    assert cost.seconds == 1.0
    for _ in range(200):
        cost.note(3.0)
    assert cost.seconds == 3.0


def test_one_more_token_costs_the_difference_to_the_longest() -> None:
    cost = CallTime()
    assert cost.extra == 0
    cost.note(1, 2.0)
    cost.note(9, 90.0)  # one timing is not used
    for _ in range(MIN_TIMINGS):
        cost.note(3, 2.1)
        cost.note(4, 5.0)
    assert cost.extra == pytest.approx(1.0)
    assert not cost.measured
    cost.note(1, 2.0)
    assert cost.note(1, 9.0) == pytest.approx(2.02)
    assert cost.measured


def test_one_more_token_is_cheap_before_any_was_timed() -> None:
    cost = CallTime()
    cost.note(1, 2.0)
    cost.note(4, 5.0)
    assert cost.extra == pytest.approx(0.3)


def test_latent_calls_are_timed_by_how_much_longer_steps_with_one_take() -> None:
    costs = Costs()
    costs.note_step(False, 3.0)
    costs.note_step(True, 8.0)
    assert costs.of["latent"].one == 5.0


def test_patches_of_one_pass_share_a_latent_call() -> None:
    """The first bytes of a pass may cost a latent call, the later ones only a patch more in it."""
    costs = costs_of(latent=10.0)
    drafts = [costs.draft("lookup", number) for number in range(1, 30)]
    assert drafts == sorted(drafts, reverse=True)
    assert drafts[-1] == pytest.approx(3 * 0.05 + costs.boundary_rate.value * 0.5, rel=0.1)
    assert costs.draft("decoder", 1) > costs.draft("entropy", 1) > costs.draft("lookup", 1)


def test_a_rate_follows_events_and_forgets() -> None:
    rate = Rate(0.5)
    for _ in range(200):
        rate.note(False)
    assert rate.value < 0.05
    for _ in range(6000):
        rate.fade()
    assert rate.value == pytest.approx(0.5, abs=0.01)


def test_nothing_is_drafted_before_calls_were_timed() -> None:
    drafter = AdaptiveDrafter(Always(100), Costs(), with_entropy=True)
    assert list(drafter.propose(TEXT, 5)) == []
    assert drafter.source is None


@pytest.mark.parametrize(
    ("accepted", "one", "best"),
    [
        ({"lookup": 6, "decoder": 8, "entropy": 2}, {}, "lookup"),
        ({"lookup": 0, "decoder": 8, "entropy": 1}, {"latent": 10.0, "entropy": 2.0}, "decoder"),
        ({"lookup": 0, "decoder": 1, "entropy": 5}, {"latent": 10.0, "entropy": 0.2}, "entropy"),
        ({"lookup": 0, "decoder": 0, "entropy": 0}, {}, "plain"),
    ],
)
def test_the_mode_with_the_lowest_time_per_byte_is_used(
    accepted: dict[Mode, int], one: dict[str, float], best: Mode
) -> None:
    drafter = adaptive(**one)
    play(drafter, 100, accepted)
    modes = play(drafter, 200, accepted)
    assert modes.count(best) > 180, modes


def test_a_change_is_noticed() -> None:
    drafter = adaptive(latent=10.0)
    play(drafter, 200, {"lookup": 8, "decoder": 0})
    assert play(drafter, 2500, {"decoder": 8})[-30:].count("decoder") > 25
    assert play(drafter, 500, {"lookup": 8})[-30:].count("lookup") > 25


def test_likely_drafts_are_made_and_unlikely_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for probability, least, most in ((0.99, 8, 8), (0.85, 2, 7), (0.02, 0, 0)):
        drafter, made = adaptive(latent=6.0), 0
        monkeypatch.setattr(drafter, "_choose_mode", lambda _: "decoder")
        drafter.propose(TEXT, 8)
        assert drafter.source == "decoder"
        while made < 8 and drafter.extend(np.append(TEXT, [42] * made), logits(probability)) is not None:
            made += 1
        assert least <= made <= most, probability


def test_a_lookup_that_is_often_rejected_is_short_but_not_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = adaptive(latent=6.0)
    monkeypatch.setattr(drafter, "_choose_mode", lambda _: "lookup")
    for _ in range(100):
        drafter.propose(TEXT, 8)
        drafter.settle(len(TEXT), accepted=False)
    assert len(drafter.propose(TEXT, 8)) == 1


def test_slower_modes_are_retried_rarely() -> None:
    drafter = adaptive()
    play(drafter, 100, {})
    modes = play(drafter, 2000, {})
    for mode in ("lookup", "decoder", "entropy"):
        assert 8 <= modes.count(mode) <= 2000 / 64


def test_planning_without_drafts_takes_a_small_share_of_the_time() -> None:
    """Where a step takes no longer than planning does, most are not planned."""
    drafter = adaptive(**dict.fromkeys(("entropy", "encoder", "latent", "decoder"), 2e-6))
    play(drafter, 100, {})
    before = drafter._round
    play(drafter, 1000, {})
    assert 2 <= drafter._round - before < 300


def test_another_text_is_looked_up() -> None:
    drafter = AdaptiveDrafter(LookupDrafter(100), costs_of(), with_entropy=True)
    other = encode(b"not the same but not the same ", bos=False)
    for text in (TEXT, other):
        drafter.begin(Sampler(0.0))
        rounds = [(list(drafter.propose(text, 3)), drafter.source) for _ in range(20)]
        assert any(found for found, _ in rounds)


def test_measurements_are_kept_for_the_next_generation() -> None:
    drafter = adaptive(latent=10.0)
    play(drafter, 100, {"decoder": 8})
    drafter.begin(Sampler(0.5, seed=1))
    assert play(drafter, 20, {"decoder": 8}).count("decoder") > 15
