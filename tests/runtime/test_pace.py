"""Guessing only while it pays: calls that take made-up times, guesses that are right or wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from blt_runtime.drafters import LookupDrafter
from blt_runtime.ids import encode
from blt_runtime.pace import Cost, Costs, Paced, Share

LOGITS = np.eye(260)[42]
TEXT = encode(b"again and again and again and ", bos=False)


class Always(LookupDrafter):
    """Has always something to say."""

    def propose(self, ids_N: np.ndarray, limit: int) -> Sequence[int]:
        return [42] * limit


def paced(read: float = 1.0, one: float = 2.0, more: float = 0.1) -> Paced:
    costs = Costs()
    costs.read.note(read)
    costs.note_pass(1, one)
    costs.note_pass(3, one + 2 * more)
    return Paced(Always(100), costs)


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


def test_one_more_byte_costs_the_difference() -> None:
    costs = Costs()
    costs.note_pass(4, 5.0)
    assert costs.more == math.inf  # nothing to compare with yet
    costs.note_pass(1, 2.0)
    assert costs.more == pytest.approx(0.3)
    costs.note_pass(4, 5.0)
    assert costs.more == pytest.approx(1.0)


def test_a_share_follows_what_happens_and_forgets() -> None:
    share = Share(0.5)
    for _ in range(200):
        share.note(False)
    assert share.value < 0.05
    for _ in range(6000):
        share.fade()
    assert share.value == pytest.approx(0.5, abs=0.01)


def test_nothing_is_guessed_before_a_pass_was_timed() -> None:
    drafter = Paced(LookupDrafter(100), Costs())
    assert list(drafter.propose(TEXT, 5)) == []
    assert drafter.extend(TEXT, 0.1, LOGITS) is None


def test_sure_guesses_are_made_and_unsure_ones_are_not() -> None:
    drafter = paced()
    assert drafter.extend(TEXT, 0.1, LOGITS) == (42, None)
    assert drafter.extend(TEXT, 3.0, LOGITS) is None


def test_doubts_add_up_along_a_row_of_guesses() -> None:
    drafter, row = paced(), 0
    while drafter.extend(np.arange(10 + row), 0.3, LOGITS) is not None:
        row += 1
    assert 2 <= row <= 8


@pytest.mark.parametrize(("more", "pays"), [(0.05, True), (5.0, False)])
def test_it_depends_on_what_calls_cost(more: float, pays: bool) -> None:
    drafter = paced(more=more)
    assert (drafter.extend(TEXT, 0.5, LOGITS) is not None) == pays
    assert bool(drafter.propose(TEXT, 5)) == pays


def test_wrong_guesses_end_guessing_and_time_starts_it_again() -> None:
    drafter, rounds = paced(more=0.3), 0
    while drafter.propose(TEXT, 5):
        drafter.settle(len(TEXT), right=False, saved=False)
        rounds += 1
        assert rounds < 60
    assert rounds > 2
    tries = 0
    for _ in range(2000):
        if drafter.propose(TEXT, 5):
            drafter.settle(len(TEXT), right=False, saved=False)
            tries += 1
    assert 3 < tries < 60


def test_a_patch_end_counts_for_the_lookup_but_not_for_the_entropy_model() -> None:
    """It is right, and saves no pass: what it cost was a read of the entropy model, which the lookup does not need."""
    drafter = paced(more=0.3)
    for _ in range(100):
        assert drafter.propose(TEXT, 5)
        drafter.settle(len(TEXT), right=True, saved=False)
    guessed = 0
    while drafter.extend(TEXT, 0.5, LOGITS) is not None and guessed < 100:
        drafter.settle(len(TEXT), right=True, saved=False)
        drafter.propose(TEXT, 0)
        guessed += 1
    assert guessed < 60
