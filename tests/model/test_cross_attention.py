"""Cross-attention under autocast: products in bfloat16, softmax and sums in float32, on a CPU as on CUDA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blt.model.layers import CrossAttention

B, S, J, D, H = 2, 5, 3, 16, 2
BF16 = torch.bfloat16


class Operations(TorchDispatchMode):
    """The dtype of what each operation of some kinds returns."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.dtypes: dict[str, set[torch.dtype]] = {name: set() for name in names}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        out = function(*arguments, **(options or {}))
        name = function.__name__.partition(".")[0]
        if name in self.dtypes:
            self.dtypes[name].add(out.dtype)
        return out


@pytest.fixture
def cross() -> CrossAttention:
    torch.manual_seed(0)
    module = CrossAttention(D, H, 1e-5)
    with torch.no_grad():
        for linear in (module.wq, module.wk, module.wv, module.wo):
            linear.weight.normal_(std=0.5)  # scores of some size, whose softmax depends on the dtype
    return module


def product(x: Tensor, linear: torch.nn.Linear) -> Tensor:
    return F.linear(x.to(BF16), linear.weight.to(BF16))


def expected(cross: CrossAttention, x_BSD: Tensor, k_BSJD: Tensor, v_BSJD: Tensor, softmax_in: torch.dtype) -> Tensor:
    """What CUDA's autocast computes for `read_few`, cast by cast."""
    heads = (H, D // H)
    q_BSHK = product(cross.q_norm(x_BSD), cross.wq).unflatten(-1, heads)
    score_BSJH = (q_BSHK[:, :, None] * k_BSJD.unflatten(-1, heads)).float().sum(-1) * (D // H) ** -0.5
    weight_BSJH = score_BSJH.to(softmax_in).softmax(2)
    out_BSHK = (weight_BSJH[..., None] * v_BSJD.unflatten(-1, heads)).float().sum(2)
    return product(out_BSHK.flatten(2), cross.wo)


def test_one_query_per_group(cross: CrossAttention) -> None:
    x_BSD, c_BSJD = torch.randn(B, S, D), torch.randn(B, S, J, D)
    with torch.autocast("cpu", BF16):
        k_BSJD, v_BSJD = cross.keys_values(c_BSJD)
        with Operations("_softmax", "sum") as operations:
            out = cross.read_few(x_BSD, k_BSJD, v_BSJD)
    assert operations.dtypes == {"_softmax": {torch.float32}, "sum": {torch.float32}}
    assert k_BSJD.dtype == v_BSJD.dtype == out.dtype == BF16
    assert torch.equal(out, expected(cross, x_BSD, k_BSJD, v_BSJD, torch.float32))
    assert not torch.equal(out, expected(cross, x_BSD, k_BSJD, v_BSJD, BF16))


def test_several_queries_per_group(cross: CrossAttention) -> None:
    x_BQD, c_BJD = torch.randn(B, S, D), torch.randn(B, J, D)
    visible_BJ = torch.tensor([[True, True, False], [True, True, True]])
    with torch.autocast("cpu", BF16):
        k_BJD, v_BJD = cross.keys_values(c_BJD)
        with Operations("_softmax") as operations:
            out = cross(x_BQD, k_BJD, v_BJD, visible_BJ)
    assert operations.dtypes == {"_softmax": {torch.float32}}
    assert out.dtype == BF16

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (H, D // H)).transpose(1, 2)

    q_BHQK = heads(product(cross.q_norm(x_BQD), cross.wq))
    score_BHQJ = q_BHQK @ heads(k_BJD).transpose(-1, -2) * (D // H) ** -0.5
    score_BHQJ = score_BHQJ.masked_fill(~visible_BJ[:, None, None], float("-inf"))
    weight_BHQJ = score_BHQJ.float().softmax(-1).to(BF16)
    assert torch.equal(out, product((weight_BHQJ @ heads(v_BJD)).transpose(1, 2).flatten(2), cross.wo))


def test_in_float32_nothing_is_cast(cross: CrossAttention) -> None:
    """So that what an export captures has no casts."""
    x_BSD, c_BSJD = torch.randn(B, S, D), torch.randn(B, S, J, D)
    with Operations("_to_copy", "sum") as operations:
        few = cross.read_few(x_BSD, *cross.keys_values(c_BSJD))
        many = cross(x_BSD[:, :, None], *cross.keys_values(c_BSJD))
    assert operations.dtypes == {"_to_copy": set(), "sum": {torch.float32}}
    assert torch.allclose(few, many[:, :, 0], atol=1e-5)
