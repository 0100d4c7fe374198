"""Guessing only while it pays: calls that take made-up times, guesses that are right or wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from blt_runtime.ids import encode
from blt_runtime.sampling import Sampler
from blt_runtime.speculation.adaptive import TIMED, CallCost, Cost, Costs, Paced, Share, Way
from blt_runtime.speculation.drafters import LookupDrafter

TEXT = encode(b"again and again and again and ", bos=False)


class Always(LookupDrafter):
    """Has always something to say."""

    def propose(self, ids_N: np.ndarray, limit: int) -> Sequence[int]:
        return [42] * limit


def costs_of(**one: float) -> Costs:
    """Calls that take so long for one token or patch, and a twentieth for each more."""
    costs = Costs()
    for name, cost in costs.of.items():
        for n in (1, 3) * TIMED:
            cost.note(n, one.get(name, 1.0) * (1 + 0.05 * (n - 1)))
    return costs


def paced(**one: float) -> Paced:
    return Paced(Always(100), costs_of(**one), with_entropy=True)


def play(drafter: Paced, rounds: int, right: dict[Way, int], probability: float = 0.9) -> list[Way]:
    """Rounds of which the first so many guesses of each way are right; who guessed in each."""
    ways: list[Way] = []
    for _ in range(rounds):
        made = len(drafter.propose(TEXT, 8))
        way: Way = drafter.source or ("lookup" if made else "plain")
        while drafter.source and made < 8:
            if drafter.extend(np.append(TEXT, [42] * made), logits(probability)) is None:
                break
            made += 1
        costs = drafter._costs
        costs.round += costs.plain + sum(costs.guess(way, place) for place in range(1, made + 1))
        for place in range(made):
            drafter.settle(len(TEXT) + place, place < right.get(way, 0))
            if place >= right.get(way, 0):
                break
        ways.append(way)
    return ways


def logits(probability: float) -> np.ndarray:
    """Of 260 ids, of which 42 has that probability."""
    out = np.full(260, math.log((1 - probability) / 259))
    out[42] = math.log(probability)
    return out


def test_a_cost_is_the_least_and_rises_slowly() -> None:
    cost = Cost()
    cost.note(2.0)
    cost.note(9.0)
    assert 2.0 < cost.seconds < 2.1
    cost.note(1.0)
    assert cost.seconds == 1.0
    for _ in range(200):
        cost.note(3.0)
    assert cost.seconds == 3.0


def test_one_more_token_costs_the_difference_to_the_longest() -> None:
    cost = CallCost()
    assert cost.more == 0
    cost.note(1, 2.0)
    cost.note(9, 90.0)  # once is not enough to be believed
    for _ in range(TIMED):
        cost.note(3, 2.1)
        cost.note(4, 5.0)
    assert cost.more == pytest.approx(1.0)
    assert not cost.known
    cost.note(1, 2.0)
    assert cost.note(1, 9.0) == pytest.approx(2.02)
    assert cost.known


def test_one_more_token_is_cheap_before_any_was_timed() -> None:
    cost = CallCost()
    cost.note(1, 2.0)
    cost.note(4, 5.0)
    assert cost.more == pytest.approx(0.3)


def test_latent_calls_are_timed_by_what_steps_with_one_take_longer() -> None:
    costs = Costs()
    costs.note_step(False, 3.0)
    costs.note_step(True, 8.0)
    assert costs.of["latent"].one == 5.0


def test_patches_of_one_pass_share_a_latent_call() -> None:
    """The first bytes of a pass may cost a latent call, the later ones only a patch more in it."""
    costs = costs_of(latent=10.0)
    guesses = [costs.guess("lookup", place) for place in range(1, 30)]
    assert guesses == sorted(guesses, reverse=True)
    assert guesses[-1] == pytest.approx(3 * 0.05 + costs.closes.value * 0.5, rel=0.1)
    assert costs.guess("decoder", 1) > costs.guess("entropy", 1) > costs.guess("lookup", 1)


def test_a_share_follows_what_happens_and_forgets() -> None:
    share = Share(0.5)
    for _ in range(200):
        share.note(False)
    assert share.value < 0.05
    for _ in range(6000):
        share.fade()
    assert share.value == pytest.approx(0.5, abs=0.01)


def test_nothing_is_guessed_before_calls_were_timed() -> None:
    drafter = Paced(Always(100), Costs(), with_entropy=True)
    assert list(drafter.propose(TEXT, 5)) == []
    assert drafter.source is None


@pytest.mark.parametrize(
    ("right", "one", "best"),
    [
        ({"lookup": 6, "decoder": 8, "entropy": 2}, {}, "lookup"),
        ({"lookup": 0, "decoder": 8, "entropy": 1}, {"latent": 10.0, "entropy": 2.0}, "decoder"),
        ({"lookup": 0, "decoder": 1, "entropy": 5}, {"latent": 10.0, "entropy": 0.2}, "entropy"),
        ({"lookup": 0, "decoder": 0, "entropy": 0}, {}, "plain"),
    ],
)
def test_the_one_who_takes_least_per_byte_guesses(right: dict[Way, int], one: dict[str, float], best: Way) -> None:
    drafter = paced(**one)
    play(drafter, 100, right)
    ways = play(drafter, 200, right)
    assert ways.count(best) > 180, ways


def test_a_change_is_noticed() -> None:
    drafter = paced(latent=10.0)
    play(drafter, 200, {"lookup": 8, "decoder": 0})
    assert play(drafter, 2500, {"decoder": 8})[-30:].count("decoder") > 25
    assert play(drafter, 500, {"lookup": 8})[-30:].count("lookup") > 25


def test_sure_guesses_are_made_and_unsure_ones_are_not() -> None:
    for probability, least, most in ((0.99, 8, 8), (0.85, 2, 7), (0.02, 0, 0)):
        drafter, made = paced(latent=6.0), 0
        drafter._choose = lambda _: "decoder"
        drafter.propose(TEXT, 8)
        assert drafter.source == "decoder"
        while made < 8 and drafter.extend(np.append(TEXT, [42] * made), logits(probability)) is not None:
            made += 1
        assert least <= made <= most, probability


def test_a_lookup_that_is_often_wrong_is_short_but_not_nothing() -> None:
    drafter = paced(latent=6.0)
    drafter._choose = lambda _: "lookup"
    for _ in range(100):
        drafter.propose(TEXT, 8)
        drafter.settle(len(TEXT), right=False)
    assert len(drafter.propose(TEXT, 8)) == 1


def test_what_loses_is_tried_again_and_rarely() -> None:
    drafter = paced()
    play(drafter, 100, {})
    ways = play(drafter, 2000, {})
    for way in ("lookup", "decoder", "entropy"):
        assert 8 <= ways.count(way) <= 2000 / 64


def test_planning_in_vain_takes_a_small_share_of_the_time() -> None:
    """Where a step takes no longer than planning does, most are not planned."""
    drafter = paced(**dict.fromkeys(("entropy", "encoder", "latent", "decoder"), 2e-6))
    play(drafter, 100, {})
    before = drafter._turn
    play(drafter, 1000, {})
    assert 2 <= drafter._turn - before < 300


def test_another_text_is_looked_up() -> None:
    drafter = Paced(LookupDrafter(100), costs_of(), with_entropy=True)
    other = encode(b"not the same but not the same ", bos=False)
    for text in (TEXT, other):
        drafter.begin(Sampler(0.0))
        ways = [(list(drafter.propose(text, 3)), drafter.source) for _ in range(20)]
        assert any(found for found, _ in ways)


def test_what_was_learned_is_kept_for_the_next_generation() -> None:
    drafter = paced(latent=10.0)
    play(drafter, 100, {"decoder": 8})
    drafter.begin(Sampler(0.5, seed=1))
    assert play(drafter, 20, {"decoder": 8}).count("decoder") > 15
