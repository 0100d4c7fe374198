"""Row lengths chosen on the data: no other choice wastes less, and the choice is deterministic."""

from __future__ import annotations

import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blt.data import BatchShape
from blt.data.buckets import choose_buckets, fit_buckets
from blt.train.config import parse_config
from blt_runtime.errors import ConfigError
from tests.data.numbered import Numbered


def waste(lengths: np.ndarray, buckets: tuple[int, ...], early: bool) -> int:
    """Tokens between each row and the nearest bucket (early), or the next larger one. Rows below the first use it."""
    total = 0
    for length in lengths.tolist():
        above = min(bucket for bucket in buckets if bucket >= length)
        below = [bucket for bucket in buckets if bucket < length and early]
        total += min([above - length, *(length - bucket for bucket in below)])
    return total


@settings(max_examples=100)
@given(st.integers(4, 48), st.integers(1, 4), st.lists(st.integers(0, 1 << 30), min_size=1, max_size=20), st.booleans())
def test_no_lengths_waste_less(longest: int, count: int, numbers: list[int], early: bool) -> None:
    lengths = np.array(numbers) % longest + 1
    step = max(1, longest // 16)
    others = sorted({2, *range(step, longest, step)} - {1})
    best = min(waste(lengths, (*pick, longest), early) for n in range(count) for pick in combinations(others, n))
    found = choose_buckets(lengths, count, longest, early)
    assert len(found) <= count
    assert list(found) == sorted(set(found))
    assert found[-1] == longest
    assert waste(lengths, found, early) == best


def test_a_length_that_saves_next_to_nothing_is_not_compiled() -> None:
    lengths = np.array([892] * 10000 + [630])
    assert choose_buckets(lengths, 8, 1024) == (896, 1024)


def test_very_long_rows_need_no_more_memory() -> None:
    """A million tokens a row are 32,768 multiples of 32, and 8 GB for the waste between any two of them."""
    lengths = np.array([500_000, 700_000] * 1000)
    tracemalloc.start()
    found = choose_buckets(lengths, 4, 1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20
    assert found == (499712, 700416, 1 << 20)  # 288 tokens past the first bucket waste less than 1,760 of padding
    assert all(length % 2048 == 0 for length in found)


def test_fitted_rows_are_those_of_the_data() -> None:
    """Whole documents of 61 and 96 input tokens, of which no two share a row of 96."""
    source, shape = Numbered([60] * 20 + [95] * 20), BatchShape(2, (96,), None, "documents")
    for seed in range(3):
        assert fit_buckets(shape, 4, source, seed=seed).buckets == (66, 96)


def test_auto_buckets_take_the_longest_alone() -> None:
    batch = {"byte_buckets": [64, 128], "auto_buckets": 4}
    model = {"dim": 16, "n_layers": 1, "n_heads": 2}
    with pytest.raises(ConfigError, match="only the longest one"):
        parse_config({"kind": "entropy", "model": model, "batch": batch})
