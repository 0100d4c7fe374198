"""Guessing only while it pays: calls that take made-up times, guesses that are right or wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from blt_runtime.drafters import LookupDrafter
from blt_runtime.ids import encode
from blt_runtime.pace import CallCost, Cost, Costs, Paced, Share

TEXT = encode(b"again and again and again and ", bos=False)


class Always(LookupDrafter):
    """Has always something to say."""

    def propose(self, ids_N: np.ndarray, limit: int) -> Sequence[int]:
        return [42] * limit


def costs_of(**one: float) -> Costs:
    """Calls that take so long for one token or patch, and a twentieth for each more."""
    costs = Costs()
    for name, cost in costs.of.items():
        for n in (1, 1, 1, 3):
            cost.note(n, one.get(name, 1.0) * (1 + 0.05 * (n - 1)))
    return costs


def paced(**one: float) -> Paced:
    return Paced(Always(100), costs_of(**one), None, with_entropy=True)


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


def test_one_more_token_costs_the_difference() -> None:
    cost = CallCost()
    cost.note(4, 5.0)
    assert cost.more == 0  # nothing to compare with yet
    cost.note(1, 2.0)
    assert cost.more == pytest.approx(0.3)  # before any was measured
    cost.note(4, 5.0)
    assert cost.more == pytest.approx(1.0)
    assert not cost.known
    cost.note(1, 2.0)
    cost.note(1, 2.0)
    assert cost.known


def test_latent_calls_are_timed_by_what_steps_with_one_take_longer() -> None:
    costs = Costs()
    costs.note_step(False, 3.0)
    costs.note_step(True, 8.0)
    assert costs.of["latent"].one == 5.0


def test_patches_of_one_pass_share_a_latent_call() -> None:
    """The first bytes of a pass may cost a latent call, the later ones only a patch more in it."""
    costs = costs_of(latent=10.0)
    guesses = [costs.guess(None, place) for place in range(1, 30)]
    assert guesses == sorted(guesses, reverse=True)
    assert guesses[-1] == pytest.approx(3 * 0.05 + costs.closes.value * 0.5, rel=0.1)
    assert costs.guess("decoder", 1) > costs.guess("entropy", 1) > costs.guess(None, 1)


def test_a_share_follows_what_happens_and_forgets() -> None:
    share = Share(0.5)
    for _ in range(200):
        share.note(False)
    assert share.value < 0.05
    for _ in range(6000):
        share.fade()
    assert share.value == pytest.approx(0.5, abs=0.01)


def test_nothing_is_guessed_before_calls_were_timed() -> None:
    drafter = Paced(Always(100), Costs(), None, with_entropy=True)
    assert list(drafter.propose(TEXT, 5)) == []
    assert drafter.source is None


def settle_all(drafter: Paced, start: int, count: int, right: bool) -> None:
    for position in range(start, start + count):
        drafter.settle(position, right)


def test_the_one_who_saves_most_guesses() -> None:
    """Looking up costs nothing; if that is mostly wrong, the decoder where latent calls are dear; nobody where only the
    decoder itself is."""
    for latent, decoder, expected in ((10.0, 1.0, "decoder"), (0.1, 20.0, None)):
        drafter = paced(latent=latent, decoder=decoder, entropy=0.5)
        assert drafter.propose(TEXT, 8)
        for _ in range(100):
            settle_all(drafter, len(TEXT), len(drafter.propose(TEXT, 8)), right=False)
            if drafter.source == "entropy":
                drafter.extend(TEXT, logits(0.1))
                drafter.settle(len(TEXT), right=False)
        choices = []
        for _ in range(50):
            drafter.propose(TEXT, 8)
            if drafter.source == "decoder":
                for n in range(8):
                    drafter.extend(np.append(TEXT, [42] * n), logits(0.97))
            elif drafter.source == "entropy":
                drafter.extend(TEXT, logits(0.1))
            choices.append(drafter.source)
            settle_all(drafter, len(TEXT), 8, right=drafter.source == "decoder")
        assert choices.count(expected) > 30, (choices, expected)


def test_sure_guesses_are_made_and_unsure_ones_are_not() -> None:
    drafter = paced(entropy=1.0, latent=6.0)
    drafter.propose(TEXT, 8)
    drafter.source = "decoder"
    assert drafter.extend(TEXT, logits(0.99)) == (42, None)
    assert drafter.extend(np.append(TEXT, 42), logits(0.02)) is None


def test_doubts_add_up_along_a_row_of_guesses() -> None:
    drafter, row = paced(latent=6.0), 0
    drafter.propose(TEXT, 40)
    drafter.source = "decoder"
    while drafter.extend(np.append(TEXT, [42] * row), logits(0.85)) is not None:
        row += 1
    assert 2 <= row <= 20


def test_wrong_guesses_end_guessing_and_time_starts_it_again() -> None:
    drafter, rounds = Paced(Always(100), costs_of(decoder=0.1, encoder=0.1, entropy=9.0), None, with_entropy=False), 0

    def tries() -> bool:
        proposed = drafter.propose(TEXT, 5)
        made = len(proposed)
        if drafter.source == "decoder":
            made = drafter.extend(TEXT, logits(0.5)) is not None
        if made:
            drafter.settle(len(TEXT), right=False)
        return bool(made)

    while tries():
        rounds += 1
        assert rounds < 200
    assert rounds > 2
    assert 3 < sum(tries() for _ in range(3000)) < 300


def test_planning_in_vain_takes_a_small_share_of_the_time() -> None:
    """A step of a microsecond: planning, which takes longer, must be rare."""
    tiny = dict.fromkeys(("entropy", "encoder", "latent", "decoder"), 2.5e-7)
    drafter, planned = Paced(LookupDrafter(100), costs_of(**tiny | {"decoder": 1e-5}), None, with_entropy=False), 0
    before = drafter._planning.notes
    for _ in range(3000):
        drafter.propose(TEXT[:4], 5)
        if drafter.source == "decoder":
            drafter.extend(TEXT[:4], logits(0.02))
            drafter.settle(4, right=False)
    planned = drafter._planning.notes - before
    assert planned < 600
