"""Whole-row attention laid out by its window: each block of W queries reads its own and the previous block of keys.

A query sees at most W keys, all of them in those two blocks, so the result equals that of a dense mask while the cost
per byte no longer grows with the row: 2 W keys instead of N. Rows of up to two windows stay dense, as cheap there.

Letters: B rows, N positions, W window and block length, J blocks, H heads, G key/value heads, K head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from blt.model import ops
from blt.model.layers import Attend
from blt.model.masks import causal_mask, dense_attend


def row_attend(document_BN: Tensor, window: int | None) -> Attend:
    """Attention within documents and the window, over rows with these document numbers (0 or more)."""
    n = document_BN.shape[1]
    if window is None or n <= 2 * window:
        return dense_attend(causal_mask(document_BN, window))
    return _block_attend(document_BN, window)


def _block_attend(document_BN: Tensor, window: int) -> Attend:
    n = document_BN.shape[1]
    pad = -n % window
    # Padded positions are a document of their own; the block before the first is another, so that nobody reads it.
    own_BJW = F.pad(document_BN, (0, pad), value=-1).unflatten(1, (-1, window))
    both_BJ2W = torch.cat([F.pad(own_BJW, (0, 0, 1, 0), value=-2)[:, :-1], own_BJW], 2)
    t_W1 = torch.arange(window, device=document_BN.device)[:, None] + window
    distance_W2W = t_W1 - torch.arange(2 * window, device=document_BN.device)
    near_W2W = (distance_W2W >= 0) & (distance_W2W < window)
    mask = (near_W2W & (own_BJW[..., None] == both_BJ2W[:, :, None])).flatten(0, 1)

    def blocks(x_BHNK: Tensor) -> Tensor:
        blocks_BJHWK: Tensor = F.pad(x_BHNK, (0, 0, 0, pad)).unflatten(2, (-1, window)).transpose(1, 2)
        return blocks_BJHWK

    def with_previous(x_BGNK: Tensor) -> Tensor:
        own_BJGWK = blocks(x_BGNK)
        before_BJGWK = F.pad(own_BJGWK, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
        return torch.cat([before_BJGWK, own_BJGWK], 3).flatten(0, 1)

    def attend(q_BHNK: Tensor, k_BGNK: Tensor, v_BGNK: Tensor) -> Tensor:
        out = ops.attend_dense(blocks(q_BHNK).flatten(0, 1), with_previous(k_BGNK), with_previous(v_BGNK), mask)
        rows_BHNK: Tensor = out.unflatten(0, (q_BHNK.shape[0], -1)).transpose(1, 2).flatten(2, 3)[:, :, :n]
        return rows_BHNK

    return attend
