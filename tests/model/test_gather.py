"""The gather of each patch's byte states, and its gradient, which is a gather by the inverse index."""

from __future__ import annotations

import pytest
import torch

from blt.model.masks import gather_rows, patch_layout


def lengths(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])


@pytest.mark.parametrize("encoder_window", [1, 2, 3])
def test_the_gradient_of_a_gather_is_a_gather(encoder_window: int) -> None:
    # 11 tokens and the virtual next one; rows with fewer patches, and a last patch longer than max_patch
    patch_lengths = lengths([[1, 4, 3, 1, 3], [1, 11], [1, 1, 1, 9], [1, 4, 4, 2, 1]])
    layout = patch_layout(patch_lengths, 11, 4, encoder_window)
    generator = torch.Generator().manual_seed(encoder_window)
    x = torch.randn(4, 11, 5, generator=generator, requires_grad=True)
    weight = torch.randn(*layout.byte_index.shape, 5, generator=generator) * layout.key_valid[..., None]
    gathered, plain = layout.gather(x), gather_rows(x, layout.byte_index)
    assert torch.equal(gathered, plain)
    (found,) = torch.autograd.grad((gathered * weight).sum(), x)
    (wanted,) = torch.autograd.grad((plain * weight).sum(), x)
    assert wanted.abs().sum() > 0
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_every_slot_holds_its_token() -> None:
    layout = patch_layout(lengths([[1, 4, 3, 1, 3], [1, 2, 9]]), 11, 4, 2)
    tokens = torch.arange(11).expand(2, -1)
    held = gather_rows(layout.byte_index.flatten(1), layout.slot.clamp(min=0))
    valid = gather_rows(layout.key_valid.flatten(1), layout.slot.clamp(min=0))
    there = layout.slot >= 0
    assert torch.equal(held[there], tokens[..., None].expand_as(held)[there])
    assert valid[there].all()
    assert int(there.sum()) == int(layout.key_valid.sum())
