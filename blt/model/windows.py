"""Whole-row attention in blocks of the window: w queries read the keys of their own block and of the blocks before it.

A window of W = m w keys spans m + 1 blocks, so the result equals that of a dense mask, but a query costs (1 + 1/m) W
keys instead of N. Rows that are too short to gain from blocks use dense masks.

Letters: B rows, N positions, W window, w block length, m blocks of a window, J blocks of a row, L = (m + 1) w keys of a
block, H heads, G key/value heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blt.model import ops
from blt.model.layers import Attend, Stack
from blt.model.masks import causal_mask, dense_attend
from blt_runtime.errors import ConfigError

LONGEST_PRODUCT = 1024
"""Dense rows of up to this many positions store their scores for the backward pass: 4 MB a head in float32."""
SHORTEST_BLOCK, MOST_BLOCKS = 64, 4
"""Measured for a window of 256 keys, one CPU core, 2 x 1024 positions, 2 heads of 64, float32, forward and backward:
one block 31.7 ms, two 26.6, four 27.5, eight 37.1; dense 56.6."""


def row_attend(document_BN: Tensor, window: int | None, flex: bool = False) -> Attend:
    """Attention within documents and within the window, for rows with these document numbers (0 or more)."""
    if flex:
        from blt.model.flex import flex_attend  # slow to import, and optional

        return flex_attend(document_BN, window)
    n = document_BN.shape[1]
    if window is None or 2 * n <= 3 * window:
        mask = causal_mask(document_BN, window)
        if n <= LONGEST_PRODUCT and _multiplies(document_BN):
            return lambda q, k, v: attend_products(q, k, v, mask)
        return dense_attend(mask)
    return BlockAttend(document_BN, window)


def choose_attention(model: nn.Module, attention: str, device: str | torch.device, compiled: bool) -> None:
    """Sets how the stacks of a model compute attention over whole rows: "auto" (blocks and masks) or "flex".

    Raises ConfigError where FlexAttention cannot train, or only in an unfused form that stores all scores.
    """
    if attention == "flex" and torch.device(device).type != "cuda":
        raise ConfigError("run.attention: flex trains only on CUDA (--device cuda); leave run.attention at auto")
    if attention == "flex" and not compiled:
        raise ConfigError("run.attention: flex needs run.compile: true; without it all scores stay in memory")
    for module in model.modules():
        if isinstance(module, Stack):
            module.flex = attention == "flex"


def _multiplies(x: Tensor) -> bool:
    return torch.compiler.is_compiling() and x.device.type == "cpu"


def attend_products(q_BHSK: Tensor, k_BGLK: Tensor, v_BGLK: Tensor, mask_BSL: Tensor) -> Tensor:
    """`ops.attend_dense` as two matrix products and a softmax, which keeps the scores for the backward pass.

    For compiled training on a CPU: torch's flash kernel there computes every score three times, and bfloat16 is as slow
    as float32. Forward and backward of the blocks above take 24.9 ms instead of 27.5 in float32, and 15.9 ms instead of
    27.5 in bfloat16.
    """
    groups = q_BHSK.shape[1] // k_BGLK.shape[1]
    if groups > 1:
        k_BGLK, v_BGLK = k_BGLK.repeat_interleave(groups, 1), v_BGLK.repeat_interleave(groups, 1)
    score_BHSL = (q_BHSK @ k_BGLK.transpose(-1, -2)).float() * q_BHSK.shape[-1] ** -0.5
    weight_BHSL = score_BHSL.masked_fill(~mask_BSL[:, None], float("-inf")).softmax(-1)
    out_BHSK: Tensor = weight_BHSL.to(v_BGLK.dtype) @ v_BGLK
    return out_BHSK


@dataclass(frozen=True)
class Blocks:
    """A row of `n` positions in blocks of `size`; a block reads its own keys and those of `before` blocks before it."""

    n: int
    size: int
    before: int

    @classmethod
    def of(cls, n: int, window: int) -> Blocks:
        before = max(1, min(MOST_BLOCKS, window // SHORTEST_BLOCK))
        return cls(n, -(-window // before), before)

    def split(self, x_BHNK: Tensor) -> Tensor:
        """[B, H, N, K] -> [B, J, H, w, K]; positions after the row are 0."""
        padded = F.pad(x_BHNK, (0, 0, 0, -self.n % self.size))
        blocks_BJHwK: Tensor = padded.unflatten(2, (-1, self.size)).transpose(1, 2)
        return blocks_BJHwK

    def keys(self, x_BGNK: Tensor) -> Tensor:
        """[B, G, N, K] -> [B * J, G, L, K]: each block after the blocks before it."""
        own_BJGwK = self.split(x_BGNK)
        padded = F.pad(own_BJGwK, (0, 0, 0, 0, 0, 0, self.before, 0))
        J = own_BJGwK.shape[1]
        return torch.cat([padded[:, i : i + J] for i in range(self.before + 1)], 3).flatten(0, 1)

    def key_views(self, x_GNK: Tensor) -> Tensor:
        """`keys` of one row, [G, N, K] -> [J, G, L, K], without a copy: every key is stored once, padding included."""
        padded_GMK = F.pad(x_GNK, (0, 0, self.before * self.size, -self.n % self.size))
        views_JGLK: Tensor = padded_GMK.unfold(1, (self.before + 1) * self.size, self.size).permute(1, 0, 3, 2)
        return views_JGLK

    def join(self, x_BJHwK: Tensor) -> Tensor:
        """[B, J, H, w, K] -> [B, H, N, K]"""
        rows_BHNK: Tensor = x_BJHwK.transpose(1, 2).flatten(2, 3)[:, :, : self.n]
        return rows_BHNK

    def mask(self, document_BN: Tensor, window: int) -> Tensor:
        """The keys of its blocks that a query attends to: bool [B * J, w, L]."""
        # Padded positions have document -1 and the blocks before the first have -2, so that no query reads them.
        own_BJw = F.pad(document_BN, (0, -self.n % self.size), value=-1).unflatten(1, (-1, self.size))
        padded = F.pad(own_BJw, (0, 0, self.before, 0), value=-2)
        J = own_BJw.shape[1]
        key_BJL = torch.cat([padded[:, i : i + J] for i in range(self.before + 1)], 2)
        position_L = torch.arange((self.before + 1) * self.size, device=document_BN.device)
        distance_wL = position_L[-self.size :, None] - position_L
        near_wL = (distance_wL >= 0) & (distance_wL < window)
        mask_BJwL: Tensor = near_wL & (own_BJw[..., None] == key_BJL[:, :, None])
        return mask_BJwL.flatten(0, 1)


class BlockAttend:
    """Attention in blocks: queries, keys and values of whole rows [B, H or G, N, K] -> [B, H, N, K].

    A key is in m + 1 blocks. The kernel reads them through overlapping views, row by row, because views of several rows
    have no common stride: so the backward pass keeps a key once and not m + 1 times. Products on a CPU (`_multiplies`)
    need copies; the compiler makes them again in the backward pass.
    """

    def __init__(self, document_BN: Tensor, window: int) -> None:
        self._blocks = Blocks.of(document_BN.shape[1], window)
        self._mask = self._blocks.mask(document_BN, window)

    def __call__(self, q_BHNK: Tensor, k_BGNK: Tensor, v_BGNK: Tensor) -> Tensor:
        if _multiplies(q_BHNK):
            return self._by_products(q_BHNK, k_BGNK, v_BGNK)
        blocks = self._blocks
        q_BJHwK = blocks.split(q_BHNK)
        mask_BJwL = self._mask.unflatten(0, q_BJHwK.shape[:2])
        groups = q_BHNK.shape[1] // k_BGNK.shape[1]
        if groups > 1:
            k_BGNK, v_BGNK = k_BGNK.repeat_interleave(groups, 1), v_BGNK.repeat_interleave(groups, 1)
        rows = [
            ops.attend_dense(q_JHwK, blocks.key_views(k_HNK), blocks.key_views(v_HNK), mask_JwL)
            for q_JHwK, k_HNK, v_HNK, mask_JwL in zip(q_BJHwK, k_BGNK, v_BGNK, mask_BJwL, strict=True)
        ]
        return blocks.join(torch.stack(rows))

    def _by_products(self, q_BHNK: Tensor, k_BGNK: Tensor, v_BGNK: Tensor) -> Tensor:
        blocks = self._blocks
        q_XHwK = blocks.split(q_BHNK).flatten(0, 1)
        out = attend_products(q_XHwK, blocks.keys(k_BGNK), blocks.keys(v_BGNK), self._mask)
        return blocks.join(out.unflatten(0, (q_BHNK.shape[0], -1)))
