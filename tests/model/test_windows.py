"""Attention in blocks of the window equals attention under the dense mask."""

from __future__ import annotations

import pytest
import torch

from blt.model.masks import causal_mask, dense_attend
from blt.model.windows import row_attend


@pytest.mark.parametrize(("n", "window"), [(40, 8), (41, 8), (17, 8), (16, 8), (9, 4), (33, 1), (12, None)])
def test_blocks_equal_the_dense_mask(n: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(n)
    document = torch.randint(0, 5, (2, n), generator=generator).sort(1).values
    q = torch.randn(2, 4, n, 8, generator=generator, requires_grad=True)
    k, v = torch.randn(2, 2, 2, n, 8, generator=generator)
    dense = dense_attend(causal_mask(document, window))(q, k, v)
    blocked = row_attend(document, window)(q, k, v)
    torch.testing.assert_close(blocked, dense, atol=1e-6, rtol=1e-6)
    weight = torch.randn(dense.shape, generator=generator)
    (dense_grad,) = torch.autograd.grad((dense * weight).sum(), q)
    (blocked_grad,) = torch.autograd.grad((blocked * weight).sum(), q)
    torch.testing.assert_close(blocked_grad, dense_grad, atol=1e-6, rtol=1e-6)
    assert blocked_grad.isfinite().all()
