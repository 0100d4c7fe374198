"""Initial weights by rows: they depend on seed, name and row alone, and have the distribution of the plain form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blt.model.init import BLOCK, CUT, draw_rows, truncated_normal

WIDTH = 48
ROWS = 3 * (BLOCK // WIDTH) + 5
"""Four blocks, the last one short."""


def rows(first: int, stop: int, *, seed: int = 1, name: str = "layers.0.weight") -> Tensor:
    drawn = torch.full((stop - first, WIDTH), torch.nan)
    draw_rows(drawn, WIDTH, seed=seed, name=name, first=first)
    return drawn


@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_rows_of_all_ranks_are_those_of_one(world: int) -> None:
    share = -(-ROWS // world)
    parts = [rows(min(rank * share, ROWS), min((rank + 1) * share, ROWS)) for rank in range(world)]
    assert torch.equal(torch.cat(parts), rows(0, ROWS))


def test_single_rows_are_those_of_the_whole() -> None:
    whole, size = rows(0, ROWS), BLOCK // WIDTH
    for first in (0, 1, size - 1, size, 3 * size, ROWS - 1):
        assert torch.equal(rows(first, first + 1), whole[first : first + 1])
    assert rows(4, 4).shape == (0, WIDTH)


def test_rows_wider_than_a_block_and_of_more_axes() -> None:
    wide, parts = torch.empty(2, BLOCK + 3), torch.empty(1, BLOCK + 3)
    draw_rows(wide, 4, seed=0, name="w")
    draw_rows(parts, 4, seed=0, name="w", first=1)
    assert torch.equal(parts[0], wide[1])
    cube = torch.empty(2, 3, 4)
    draw_rows(cube, 4, seed=0, name="w")
    flat = torch.empty(2, 12)
    draw_rows(flat, 4, seed=0, name="w")
    assert torch.equal(cube.flatten(1), flat)


def test_seed_name_and_block_give_other_numbers() -> None:
    size = BLOCK // WIDTH
    drawn = [rows(0, size), rows(0, size, seed=2), rows(0, size, name="layers.1.weight"), rows(size, 2 * size)]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            correlation = torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]
            assert abs(correlation) < 0.02  # ten standard deviations of 262,000 independent pairs


def test_the_distribution_is_that_of_the_plain_form() -> None:
    """Quantiles of 790,000 numbers each, in sigmas; their standard errors are below 0.01."""
    ours, plain = rows(0, ROWS), torch.empty(ROWS, WIDTH)
    truncated_normal(plain, WIDTH, torch.Generator().manual_seed(0))
    sigmas = [x.flatten().double().sort().values * WIDTH**0.5 for x in (ours, plain)]
    at = torch.linspace(0.002, 0.998, 101).mul(len(sigmas[0])).long()
    assert (sigmas[0][at] - sigmas[1][at]).abs().max() < 0.06
    assert sigmas[0].abs().max() <= CUT * (1 + 1e-6)
    assert sigmas[0].abs().max() > CUT - 0.01
    assert abs(sigmas[0].std() - sigmas[1].std()) < 0.006
