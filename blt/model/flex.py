"""Whole-row attention by torch's FlexAttention, an option on CUDA (`run.attention: flex`).

The kernel skips blocks of keys that no query of a block attends to: those outside the window and in other documents.
Its backward pass exists only on CUDA; elsewhere only the forward pass runs, which is what the tests compare.

Letters: B rows, N positions, H heads, G key/value heads, K head size.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from blt.model.layers import Attend


def flex_attend(document_BN: Tensor, window: int | None) -> Attend:
    """Attention within documents and within the window, for rows with these document numbers."""
    mask = block_mask(document_BN, window)

    def attend(q_BHNK: Tensor, k_BGNK: Tensor, v_BGNK: Tensor) -> Tensor:
        grouped = q_BHNK.shape[1] != k_BGNK.shape[1]
        out: Tensor = flex_attention(q_BHNK, k_BGNK, v_BGNK, block_mask=mask, enable_gqa=grouped)
        return out

    return attend


def block_mask(document_BN: Tensor, window: int | None) -> BlockMask:
    B, n = document_BN.shape

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (key <= query) & (query - key < (window or n))
        return near & (document_BN[b, query] == document_BN[b, key])

    return create_block_mask(sees, B, None, n, n, device=document_BN.device)
