"""Pairwise covers: few cases in which every pair of values of two parameters occurs, instead of the full product."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

Case = tuple[Any, ...]
Pair = tuple[tuple[int, Any], ...]


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


def long_cover(*parameters: Sequence[Any], tries: int = 60) -> list[Case]:
    """The same for many parameters, whose product is too long to search: the best of `tries` cases comes next, each of
    them built from a missing pair by the value with the most new pairs, of one parameter after another in random order.
    Deterministic."""
    random = np.random.default_rng(1)
    missing = set(_all_pairs(parameters))
    chosen: list[Case] = []
    while missing:
        first = next(pair for pair in _all_pairs(parameters) if pair in missing)
        built = []
        for _ in range(tries):
            case = dict(first)
            for place in random.permutation(len(parameters)).tolist():
                if place not in case:
                    new = [
                        sum(_pair((place, value), item) in missing for item in case.items())
                        for value in parameters[place]
                    ]
                    best = [value for value, count in zip(parameters[place], new, strict=True) if count == max(new)]
                    case[place] = best[int(random.integers(len(best)))]
            built.append(tuple(case[place] for place in range(len(parameters))))
        chosen.append(max(built, key=lambda case: len(missing & _pairs(case))))
        missing -= _pairs(chosen[-1])
    return chosen


def _all_pairs(parameters: Sequence[Sequence[Any]]) -> Iterator[Pair]:
    for (i, a), (j, b) in itertools.combinations(enumerate(parameters), 2):
        yield from itertools.product([(i, x) for x in a], [(j, y) for y in b])


def _pair(one: tuple[int, Any], other: tuple[int, Any]) -> Pair:
    return (one, other) if one[0] < other[0] else (other, one)


def _pairs(case: Iterable[Any]) -> set[Pair]:
    return set(itertools.combinations(enumerate(case), 2))
