"""Pairwise covers: few cases in which every pair of values of two parameters occurs, instead of the full product."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Case = tuple[Any, ...]


def pairwise(*parameters: Sequence[Any], allowed: Callable[[Case], bool] = lambda case: True) -> list[Case]:
    """Cases, one value of each parameter, that contain every pair of two parameters' values which an `allowed` case
    contains. Greedy and deterministic: the first case with the most new pairs comes next."""
    cases = [case for case in itertools.product(*parameters) if allowed(case)]
    missing = set().union(*(_pairs(case) for case in cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(missing & _pairs(case)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(case: Iterable[Any]) -> set[tuple[tuple[int, Any], ...]]:
    return set(itertools.combinations(enumerate(case), 2))
