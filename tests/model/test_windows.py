"""Attention in blocks of the window equals attention with the dense mask."""

from __future__ import annotations

import pytest
import torch

from blt.model import ops
from blt.model.masks import causal_mask, dense_attend
from blt.model.windows import Blocks, attend_products, row_attend


@pytest.mark.parametrize(
    ("n", "window"),
    [
        (40, 8),
        (41, 8),
        (17, 8),
        (16, 8),
        (13, 8),
        (12, 8),
        (9, 4),
        (33, 1),
        (12, None),
        (400, 128),
        (411, 150),
        (640, 259),
    ],
)
def test_blocks_equal_the_dense_mask(n: int, window: int | None) -> None:
    """In float64, where nothing but a wrong key is larger than 1e-12."""
    generator = torch.Generator().manual_seed(n)
    document = torch.randint(0, 5, (2, n), generator=generator).sort(1).values
    q = torch.randn(2, 4, n, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    k, v = torch.randn(2, 2, 2, n, 8, generator=generator, dtype=torch.float64)
    dense = dense_attend(causal_mask(document, window))(q, k, v)
    blocked = row_attend(document, window)(q, k, v)
    torch.testing.assert_close(blocked, dense, atol=1e-12, rtol=1e-12)
    weight = torch.randn(dense.shape, generator=generator, dtype=torch.float64)
    (dense_grad,) = torch.autograd.grad((dense * weight).sum(), q)
    (blocked_grad,) = torch.autograd.grad((blocked * weight).sum(), q)
    torch.testing.assert_close(blocked_grad, dense_grad, atol=1e-12, rtol=1e-12)
    assert blocked_grad.isfinite().all()


@pytest.mark.parametrize(("n", "window"), [(400, 128), (411, 150), (640, 259)])
def test_a_window_of_several_blocks_reads_fewer_keys(n: int, window: int) -> None:
    blocks = Blocks.of(n, window)
    assert blocks.before >= 2
    assert window - 1 <= blocks.before * blocks.size < window + blocks.before
    mask = blocks.mask(torch.zeros(1, n, dtype=torch.long), window)
    assert mask.shape == (-(-n // blocks.size), blocks.size, (blocks.before + 1) * blocks.size)


def test_attention_by_products_equals_the_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 16, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    mask = torch.rand(3, 16, 16, generator=generator) < 0.5
    mask |= torch.eye(16, dtype=torch.bool)
    weight = torch.randn(3, 4, 16, 8, generator=generator)
    results = []
    for attend in (attend_products, ops.attend_dense):
        out = attend(q, k, v, mask)
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_keys_and_values_are_kept_once() -> None:
    """As attention over copies of the keys, to the bit, with one copy of each for the backward pass."""
    generator = torch.Generator().manual_seed(0)
    n, window = 300, 128
    document = torch.randint(0, 3, (2, n), generator=generator).sort(1).values
    q, k, v = (torch.randn(2, 4, n, 8, generator=generator, requires_grad=True) for _ in range(3))
    weight = torch.randn(2, 4, n, 8, generator=generator)
    blocks = Blocks.of(n, window)

    def with_copies() -> torch.Tensor:
        rows = blocks.split(q).flatten(0, 1), blocks.keys(k), blocks.keys(v)
        return blocks.join(ops.attend_dense(*rows, blocks.mask(document, window)).unflatten(0, (2, -1)))

    found, kept = [], []
    attend = row_attend(document, window)
    for attention in (lambda: attend(q, k, v), with_copies):
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = attention()
        found.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    padded = n + -n % blocks.size
    one_key = 4 * 2 * 4 * blocks.size * 8
    saved_keys = 2 * one_key * (padded // blocks.size + blocks.before)
    all_copies = 2 * one_key * (padded // blocks.size) * (blocks.before + 1)
    assert kept[1] - kept[0] == pytest.approx(all_copies - saved_keys, rel=0.05)
