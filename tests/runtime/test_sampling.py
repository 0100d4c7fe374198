"""Samplers: greedy ties, trimming, and frequencies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from blt_runtime.errors import UsageError
from blt_runtime.sampling import Sampler, choose_all

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], dtype=np.float32))


def kept(**options: Any) -> list[int]:
    order, _ = Sampler(temperature=1.0, **options).candidates(LOGITS)
    return order.tolist()


def test_greedy_chooses_the_lowest_of_equal_ids() -> None:
    assert Sampler(0.0)(np.array([0.0, 2.0, 2.0], dtype=np.float32)) == 1


def test_trimming() -> None:
    assert kept() == [1, 3, 2, 0]
    assert kept(top_k=2) == [1, 3]
    assert kept(top_p=0.69) == [1, 3]
    assert kept(top_p=0.71) == [1, 3, 2]
    assert kept(top_p=1.0) == [1, 3, 2, 0]
    assert kept(min_p=0.49) == [1, 3, 2]
    assert kept(min_p=1.0) == [1]
    assert kept(top_k=3, top_p=0.3) == [1]


def test_frequencies() -> None:
    sampler = Sampler(temperature=1.0, seed=0)
    counts = np.bincount([sampler(LOGITS) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(counts, np.exp(LOGITS), atol=0.015)
    cold = Sampler(temperature=0.5, seed=0)
    counts = np.bincount([cold(LOGITS) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(counts, np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum(), atol=0.015)


@pytest.mark.parametrize("scale", [0.3, 3.0, 40.0])
@pytest.mark.parametrize("width", [4, 260])
def test_samplers_choose_together_what_each_chooses_alone(scale: float, width: int) -> None:
    """Bit for bit, with the random numbers of each; one of a subclass is among them."""

    class Last(Sampler):
        def __call__(self, logits_V: np.ndarray) -> int:
            return len(logits_V) - 1

    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1e-9},
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 1.3, "top_k": 3, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 1.0, "min_p": 0.2},
    ]
    options = [dict(kind, seed=seed) for seed in range(9) for kind in kinds]
    together, alone = ([*(Sampler(**some) for some in options), Last(1.0)] for _ in range(2))
    random = np.random.default_rng(0)
    for _ in range(20):
        logits = list(random.normal(0, scale, (len(together), width)).astype(np.float32))
        logits[7][:] = 0.0  # ties
        assert choose_all(together, logits) == [sampler(row) for sampler, row in zip(alone, logits, strict=True)]
    assert choose_all([], []) == []


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 20.0])
def test_the_first_ids_are_chosen_as_from_all_sorted(scale: float) -> None:
    sampler, random = Sampler(0.8, seed=0), np.random.default_rng(1)
    known = 0
    for number in random.random(2_000):
        logits_V = random.normal(0, scale, 260).astype(np.float32)
        found = sampler._among_first(logits_V, number)
        known += found is not None
        assert found in (None, sampler._from_sorted(logits_V, number))
    least = {0.0: 100, 0.5: 150, 3.0: 1_400, 20.0: 1_990}  # of random logits; those of a model are rarely flat
    assert known >= least[scale]


def test_a_number_at_the_border_of_two_ids_is_left_to_the_sorted_form() -> None:
    sampler = Sampler(1.0)
    order_V, mass_V = sampler.candidates(LOGITS)
    border = float(mass_V[0])
    assert order_V[0] == 1
    assert sampler._among_first(LOGITS, border) is None
    assert sampler._among_first(LOGITS, 0.4 - 1e-6) == sampler._from_sorted(LOGITS, 0.4 - 1e-6) == 1
    assert sampler._among_first(LOGITS, 0.4 + 1e-6) == sampler._from_sorted(LOGITS, 0.4 + 1e-6) == 3
    nothing = np.full(4, np.nan, dtype=np.float32)
    assert sampler._among_first(nothing, 0.5) is None


def test_a_tiny_temperature_is_greedy() -> None:
    assert {Sampler(temperature=1e-9, seed=s)(LOGITS) for s in range(20)} == {1}


def test_seeds() -> None:
    first, second = (Sampler(temperature=1.0, seed=7) for _ in range(2))
    assert [first(LOGITS) for _ in range(50)] == [second(LOGITS) for _ in range(50)]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "a"},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_k": True},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": "a"},
        {"min_p": 2},
        {"min_p": [0.5]},
        {"seed": -1},
        {"seed": 1.5},
    ],
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        Sampler(**{"temperature": 1.0, **options})  # type: ignore[arg-type]
