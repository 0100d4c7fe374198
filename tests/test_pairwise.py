"""The covers of `tests.pairwise` contain every pair, and are smaller than the product."""

from __future__ import annotations

import itertools

from tests.pairwise import long_cover, pairwise

PARAMETERS = (range(25), "abcd", (True, False, None))


def test_every_pair_occurs() -> None:
    cases = pairwise(*PARAMETERS)
    for one, other in itertools.combinations(range(3), 2):
        pairs = {(case[one], case[other]) for case in cases}
        assert pairs == set(itertools.product(PARAMETERS[one], PARAMETERS[other]))
    assert len(cases) == 100


def test_forbidden_cases_are_left_out_and_their_pairs_are_not_wanted() -> None:
    cases = pairwise(range(3), range(3), range(3), allowed=lambda case: case[0] != case[1])
    assert all(one != other for one, other, _ in cases)
    assert {(one, other) for one, other, _ in cases} == set(itertools.permutations(range(3), 2))


def test_the_same_cases_every_time() -> None:
    assert pairwise(*PARAMETERS) == pairwise(*PARAMETERS)


def test_covers_of_many_parameters() -> None:
    parameters = [*PARAMETERS[1:], *[range(3)] * 12]
    cases = long_cover(*parameters, tries=3)
    for one, other in itertools.combinations(range(len(parameters)), 2):
        pairs = {(case[one], case[other]) for case in cases}
        assert pairs == set(itertools.product(parameters[one], parameters[other]))
    assert len(cases) < 40
    assert cases == long_cover(*parameters, tries=3)
