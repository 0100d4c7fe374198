"""Amounts and times in log lines: three digits, one unit."""

from __future__ import annotations

import pytest

from blt.data.quantities import amount, duration


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"), (999, "999 B"), (999.6, "1.00 kB"), (1000, "1.00 kB"), (9_996, "10.0 kB"), (61_540, "61.5 kB"),
        (123_456, "123 kB"), (999_600, "1.00 MB"), (11_100_000, "11.1 MB"), (8.69e9, "8.69 GB"), (2.5e12, "2,500 GB"),
    ],
)  # fmt: skip
def test_amounts_have_three_digits_and_the_largest_unit(n_bytes: float, text: str) -> None:
    assert amount(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3725, "1 h 02 min"), (3e5, "3 d 11 h")],
)
def test_durations_have_at_most_two_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words
