"""The patches of whole rows, and which positions attend to which (spec sections 5, 8 and 10).

All shapes are static and no branch depends on a value, so that a training step is one compiled graph per bucket.

Letters: B rows, N tokens, P patches, L longest patch, E patches that the encoder's cross-attention spans, V = L * E
width of the gather, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blt.model import ops
from blt.model.layers import Attend
from blt_runtime.ids import EOS, NEWLINE


def document_ids(ids_BN: Tensor, reset_newlines: bool = False) -> Tensor:
    """Number of documents that ended before each token, [B, N]. An EOS belongs to the document that it ends."""
    ends_BN = ids_BN == EOS
    if reset_newlines:
        ends_BN = ends_BN | (ids_BN == NEWLINE)
    return ends_BN.cumsum(1) - ends_BN.long()


def causal_mask(document_BN: Tensor, window: int | None) -> Tensor:
    """Whether a key is in the same document, not later, and fewer than `window` positions back. bool [B, N, N]"""
    n = document_BN.shape[1]
    t_N1 = torch.arange(n, device=document_BN.device)[:, None]
    distance_NN = t_N1 - t_N1.T
    near_NN = (distance_NN >= 0) & (distance_NN < (window or n))
    return near_NN & (document_BN[:, :, None] == document_BN[:, None, :])


def dense_attend(mask_BNN: Tensor) -> Attend:
    return lambda q, k, v: ops.attend_dense(q, k, v, mask_BNN)


@dataclass(frozen=True)
class PatchLayout:
    """Which tokens a patch reads, and which patches a token reads, for every row.

    encoder_id [B, N]: the patch of each token.  decoder_row [B, N, W]: the last W patches that are complete at each
    token, oldest first, -1 for none.  byte_index [B, P, V]: the tokens that the queries of each patch read; key_valid
    [B, P, V] marks real entries, own_valid those of the patch itself.  slot [B, N, E]: the entries p * V + v of
    byte_index that hold each token, for the E patches that may read it, -1 for none.
    """

    encoder_id: Tensor
    decoder_row: Tensor
    byte_index: Tensor
    key_valid: Tensor
    own_valid: Tensor
    slot: Tensor

    def gather(self, x_BND: Tensor) -> Tensor:
        """The entries of x [B, N, D] that the queries of each patch read, [B, P, V, D]. Invalid entries have any value,
        and their gradient must be 0."""
        out: Tensor = GatherBytes.apply(x_BND, self.byte_index, self.slot)
        return out


def patch_layout(
    patch_lengths_BP: Tensor, n_tokens: int, max_patch: int, encoder_window: int = 1, decoder_window: int = 1
) -> PatchLayout:
    """Layout of rows of `n_tokens` tokens. Lengths sum to n_tokens + 1 (the virtual next token) and are zero padded.

    A patch longer than `max_patch` is cut. This is allowed only for the last one, which no token reads.
    """
    device = patch_lengths_BP.device
    end_BP = patch_lengths_BP.cumsum(1)
    start_BP = end_BP - patch_lengths_BP
    t_BN1 = torch.arange(n_tokens + 1, device=device).expand(end_BP.shape[0], -1).contiguous()
    id_BN1 = torch.searchsorted(end_BP.contiguous(), t_BN1, right=True)
    last_BN = id_BN1[:, 1:] - 1
    back_W = torch.arange(decoder_window - 1, -1, -1, device=device)
    decoder_row_BNW = (last_BN[..., None] - back_W).clamp(min=-1)

    first_BP = torch.cat([start_BP[:, :1].expand(-1, encoder_window - 1), start_BP], 1)[:, : start_BP.shape[1]]
    index_BPV = first_BP[..., None] + torch.arange(max_patch * encoder_window, device=device)
    key_valid = (index_BPV < end_BP[..., None]) & (index_BPV < n_tokens)
    own_valid = key_valid & (index_BPV >= start_BP[..., None])
    id_BN = id_BN1[:, :-1]
    slot_BNE = _slots(id_BN, first_BP, index_BPV.shape[2], encoder_window)
    return PatchLayout(id_BN, decoder_row_BNW, index_BPV.clamp(max=n_tokens - 1), key_valid, own_valid, slot_BNE)


def _slots(id_BN: Tensor, first_BP: Tensor, V: int, encoder_window: int) -> Tensor:
    """Inverse of `byte_index`: token t is entry v = t - first[p] of patch p, for its own patch and the next E - 1."""
    n_patches, n = first_BP.shape[1], id_BN.shape[1]
    p_BNE = id_BN[..., None] + torch.arange(encoder_window, device=id_BN.device)
    first_BNE = gather_rows(first_BP, p_BNE.clamp(max=n_patches - 1))
    v_BNE = torch.arange(n, device=id_BN.device)[:, None] - first_BNE
    return torch.where((p_BNE < n_patches) & (v_BNE < V), p_BNE * V + v_BNE, -1)


def patch_document_ids(ids_BN: Tensor, layout: PatchLayout) -> Tensor:
    """Number of earlier patches with an EOS, [B, P]: a patch belongs to the document in which it starts."""
    ids_BPV = gather_rows(ids_BN, layout.byte_index)
    has_eos_BP = ((ids_BPV == EOS) & layout.own_valid).any(-1).long()
    return has_eos_BP.cumsum(1) - has_eos_BP


def gather_rows(x_BN: Tensor, index_BPV: Tensor) -> Tensor:
    """x[b, index[b, p, v]]: [B, N, ...] -> [B, P, V, ...]"""
    row_B11 = torch.arange(x_BN.shape[0], device=x_BN.device)[:, None, None]
    return x_BN[row_B11, index_BPV]


class GatherBytes(torch.autograd.Function):
    """`gather_rows` with a gather as its gradient, too: `slot` lists the entries of every token, so nothing is
    scattered. Torch's deterministic scatter runs in one thread."""

    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, index_BPV: Tensor, slot_BNE: Tensor) -> Tensor:
        ctx.save_for_backward(slot_BNE)
        return gather_rows(x_BND, index_BPV)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (slot_BNE,) = ctx.saved_tensors
        (grad_BPVD,) = gradients
        grad_BNED = gather_rows(grad_BPVD.flatten(1, 2), slot_BNE.clamp(min=0))
        return (grad_BNED * (slot_BNE >= 0)[..., None]).sum(2), None, None
