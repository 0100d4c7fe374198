"""The blocks of every stage: norm, rotary embedding, attention, feed-forward, cross-attention.

A block does not decide what a query may attend to. It is given an `Attend`, a function from queries, keys and values to
the attention output: dense masks (`blt.model.masks`), blocks of a window (`blt.model.windows`), FlexAttention
(`blt.model.flex`), caches updated in place, or caches as graph inputs and outputs (both in `blt.model.steps`).

Letters: B rows, S positions, D width, H heads, G key/value heads, K head size, J keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blt.model import ops
from blt.model.config import TransformerConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_BHSK, k_BGSK, v_BGSK) -> out_BHSK"""


class Rotation(NamedTuple):
    """Cosines and sines of each position's angles, [B, S, K/2] or [S, K/2]."""

    cos: Tensor
    sin: Tensor


class RotaryTable(nn.Module):
    """Angles of positions 0 .. rows-1 for one head size, float32, not stored in checkpoints."""

    cos: Tensor
    sin: Tensor

    def __init__(self, rows: int, head_size: int, theta: float) -> None:
        super().__init__()
        self._made_of = rows, head_size, theta
        self.make_buffers()

    def make_buffers(self, dtype: torch.dtype = torch.float32) -> None:
        """Called again after the module was built on the meta device. dtype: of the angles; the frequencies are those
        of float32."""
        rows, head_size, theta = self._made_of
        frequency_K = 1.0 / theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
        angle_NK = torch.outer(torch.arange(rows, dtype=dtype), frequency_K.to(dtype))
        self.register_buffer("cos", angle_NK.cos(), persistent=False)
        self.register_buffer("sin", angle_NK.sin(), persistent=False)

    def at(self, positions_BS: Tensor) -> Rotation:
        return Rotation(self.cos[positions_BS], self.sin[positions_BS])

    def first(self, n: int) -> Rotation:
        return Rotation(self.cos[:n], self.sin[:n])


def rotate(x_BHSK: Tensor, rotation: Rotation) -> Tensor:
    """Rotates neighbouring pairs (x[2i], x[2i+1]) by their angle, in float32."""
    if ops.exporting():
        rotated: Tensor = ops.rope(x_BHSK, rotation.cos, rotation.sin)
        return rotated
    return ops.rotate_pairs(x_BHSK, rotation.cos, rotation.sin)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, statistics in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if ops.exporting():
            normed: Tensor = ops.rms_norm(x, self.weight, self.eps)
            return normed
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def linear(n_in: int, n_out: int) -> nn.Linear:
    return nn.Linear(n_in, n_out, bias=False)


def cast_once(x: Tensor) -> Tensor:
    """`x` in the dtype of autocast, if it is on. Otherwise each product that reads `x` would cast it, and keep its own
    copy for the backward pass."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


class Attention(nn.Module):
    """Self-attention with rotary embedding; query head h reads key/value head h // (H / G)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.wq = linear(config.dim, config.n_heads * config.head_size)
        self.wk = linear(config.dim, config.kv_heads * config.head_size)
        self.wv = linear(config.dim, config.kv_heads * config.head_size)
        self.wo = linear(config.n_heads * config.head_size, config.dim)

    def _heads(self, x_BSD: Tensor) -> Tensor:
        heads_BHSK: Tensor = x_BSD.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        return heads_BHSK

    def forward(self, x_BSD: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        x_BSD = cast_once(x_BSD)
        q_BHSK = rotate(self._heads(self.wq(x_BSD)), rotation)
        k_BGSK = rotate(self._heads(self.wk(x_BSD)), rotation)
        out_BHSK = attend(q_BHSK, k_BGSK, self._heads(self.wv(x_BSD)))
        out: Tensor = self.wo(out_BHSK.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = linear(dim, hidden_dim)
        self.w3 = linear(dim, hidden_dim)
        self.w2 = linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = cast_once(x)
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config.dim, config.hidden_dim)

    def forward(self, x_BSD: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        h_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotation, attend)
        out: Tensor = h_BSD + self.feed_forward(self.ffn_norm(h_BSD))
        return out


class Stack(nn.Module):
    """The blocks of one stage and their rotary table. `flex`: use FlexAttention for whole rows (`blt.model.flex`)."""

    flex = False

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.rotary = RotaryTable(config.max_seqlen, config.head_size, config.rope_theta)

    def run_layers(self, x_BSD: Tensor, rotation: Rotation, attends: Sequence[Attend]) -> Tensor:
        for layer, attend in zip(self.layers, attends, strict=True):
            x_BSD = layer(x_BSD, rotation, attend)
        return x_BSD


class CrossAttention(nn.Module):
    """Queries of one stage read keys and values of another; no rotary embedding, no grouped heads.

    Returns the attention output without the residual. In the published model this layer adds its input and its caller
    adds the input a second time (spec section 2), so callers write `2 * x + cross(x, ...)`.
    """

    def __init__(self, dim: int, n_heads: int, eps: float) -> None:
        super().__init__()
        self.n_heads, self.head_size = n_heads, dim // n_heads
        self.q_norm = RMSNorm(dim, eps)
        self.kv_norm = RMSNorm(dim, eps)
        self.wq, self.wk, self.wv, self.wo = (linear(dim, dim) for _ in range(4))

    def keys_values(self, c_D: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., D] of the vectors c [..., D]."""
        normed = cast_once(self.kv_norm(c_D))
        return self.wk(normed), self.wv(normed)

    def forward(self, x_QD: Tensor, k_JD: Tensor, v_JD: Tensor, visible_J: Tensor | None = None) -> Tensor:
        """Attention of each group of Q queries over the J keys of the group.

        x [..., Q, D]; k, v [..., J, D]; visible [..., J] bool, at least one True in each group. Returns [..., Q, D].
        """
        q_HQK = self._heads(self.wq(self.q_norm(x_QD)))
        k_HKJ = self._heads(k_JD).transpose(-1, -2)
        score_HQJ = q_HQK @ k_HKJ * self.head_size**-0.5
        if visible_J is not None:
            score_HQJ = score_HQJ.masked_fill(~visible_J[..., None, None, :], float("-inf"))
        weight_HQJ = _softmax(score_HQJ, -1)
        out_HQK = _as(weight_HQJ, v_JD) @ self._heads(v_JD)
        out: Tensor = self.wo(out_HQK.transpose(-2, -3).flatten(-2))
        return out

    def _heads(self, x_JD: Tensor) -> Tensor:
        heads_HJK: Tensor = x_JD.unflatten(-1, (self.n_heads, self.head_size)).transpose(-2, -3)
        return heads_HJK

    def read_few(self, x_BSD: Tensor, k_BSJD: Tensor, v_BSJD: Tensor, visible_BSJ: Tensor | None = None) -> Tensor:
        """`forward` for one query per group and very few keys (the k slices of a patch).

        It uses elementwise products and sums, because thousands of 1 x K by K x 2 matrix products cost more in calls
        than in arithmetic.
        """
        heads = (self.n_heads, self.head_size)
        q_BSHK = self.wq(self.q_norm(x_BSD)).unflatten(-1, heads)
        product_BSJHK = q_BSHK[:, :, None] * k_BSJD.unflatten(-1, heads)
        score_BSJH = _sum(product_BSJHK, -1) * self.head_size**-0.5
        if visible_BSJ is not None:
            score_BSJH = score_BSJH.masked_fill(~visible_BSJ[..., None], float("-inf"))
        weight_BSJH = _softmax(score_BSJH, 2)
        out_BSHK = _sum(weight_BSJH[..., None] * v_BSJD.unflatten(-1, heads), 2)
        out: Tensor = self.wo(_as(out_BSHK, v_BSJD).flatten(2))
        return out


# CUDA's autocast computes softmax and sums in float32, a CPU's does not. These do the same on both. They add nothing to
# a graph of float32, so that what an export captures stays the same.


def _softmax(x: Tensor, dim: int) -> Tensor:
    return x.softmax(dim) if x.dtype == torch.float32 else x.softmax(dim, dtype=torch.float32)


def _sum(x: Tensor, dim: int) -> Tensor:
    return x.sum(dim) if x.dtype == torch.float32 else x.sum(dim, dtype=torch.float32)


def _as(x: Tensor, like: Tensor) -> Tensor:
    return x if x.dtype == like.dtype else x.to(like.dtype)
