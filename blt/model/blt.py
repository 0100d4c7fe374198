"""The Byte Latent Transformer over whole rows: local encoder, latent transformer, local decoder.

This form is trained. `blt.model.steps` runs the same modules incrementally, `blt.generate.reference` is the slow and
plain form, and tests hold the three together.

Letters: B rows, N tokens, P patches, V width of the byte gather, k slices a patch, D local width, E = k * D,
G latent width, W patches a decoder token may read, Y cross-attention layers of the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from blt.model.config import BLTConfig
from blt.model.hashing import HashEmbedding, embed
from blt.model.init import init_weights
from blt.model.layers import Attend, CrossAttention, RMSNorm, Rotation, Stack, linear
from blt.model.masks import (
    PatchLayout,
    document_ids,
    patch_document_ids,
    patch_layout,
)
from blt.model.windows import row_attend


def cross_layers(n: int, dim: int, n_heads: int, eps: float) -> nn.ModuleList:
    return nn.ModuleList(CrossAttention(dim, n_heads, eps) for _ in range(n))


def crosses(layers: nn.ModuleList) -> list[CrossAttention]:
    return cast(list[CrossAttention], list(layers))


class LocalEncoder(Stack):
    """Turns bytes into byte states, and the byte states of a patch into its vector."""

    def __init__(self, config: BLTConfig) -> None:
        super().__init__(config.encoder)
        self.pooling, self.k = config.pooling, config.cross_k
        self.byte_embedding = nn.Embedding(config.vocab_size, config.local_dim)
        self.query = nn.Embedding(1, config.local_dim) if config.pooling == "learned" else None
        self.patch_projection = linear(config.local_dim, config.cross_k * config.local_dim)
        self.cross = cross_layers(
            config.encoder_cross_layers, config.local_dim, config.encoder_heads, config.encoder.norm_eps
        )

    def byte_states(self, x_BND: Tensor, rotation: Rotation, attends: Sequence[Attend]) -> list[Tensor]:
        """Outputs [B, N, D] of the layers that a cross-attention reads; the last is the output of the encoder."""
        states = []
        for layer, attend in zip(self.layers, attends, strict=True):
            x_BND = layer(x_BND, rotation, attend)
            states.append(x_BND)
        return states[-len(self.cross) :]

    def pool(self, states_BPVD: Sequence[Tensor], key_valid_BPV: Tensor, own_valid_BPV: Tensor) -> Tensor:
        """Patch vectors [B, P, E] from the gathered byte states of each cross-attention layer (spec section 7).

        The first states are pooled over the patch's own bytes. With pooling `learned`, the paper's ablation of this
        initialisation, every patch starts from one trained vector instead. Then the k queries of a patch read the
        visible bytes, layer by layer. A patch without bytes pools to 0 and attends to nothing.
        """
        return self.pool_read(states_BPVD[0], self.keys_values(states_BPVD), key_valid_BPV, own_valid_BPV)

    def keys_values(self, states: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each cross-attention layer, from the byte states [..., D] that it reads."""
        return [cross.keys_values(state) for cross, state in zip(crosses(self.cross), states, strict=True)]

    def pool_read(
        self,
        first_BPVD: Tensor,
        keys_values: Sequence[tuple[Tensor, Tensor]],
        key_valid_BPV: Tensor,
        own_valid_BPV: Tensor,
    ) -> Tensor:
        """`pool` with the gathered keys and values [B, P, V, D] of each layer.

        Keys and values are computed before the gather: once per byte, and not once per entry of the gather, of which
        the demo's rows have 3.5 times as many.
        """
        p_BPkD = self.patch_projection(self._reduce(first_BPVD, own_valid_BPV)).unflatten(-1, (self.k, -1))
        any_BP1 = key_valid_BPV.any(-1)[..., None]
        visible_BPV, any_BP11 = key_valid_BPV | ~any_BP1, any_BP1[..., None]
        for cross, (key, value) in zip(crosses(self.cross), keys_values, strict=True):
            p_BPkD = 2 * p_BPkD + cross(p_BPkD, key, value, visible_BPV) * any_BP11
        p_BPE: Tensor = p_BPkD.flatten(2)
        return p_BPE

    def _reduce(self, h_BPVD: Tensor, valid_BPV: Tensor) -> Tensor:
        valid_BPV1, any_BP1 = valid_BPV[..., None], valid_BPV.any(-1)[..., None]
        if self.query is not None:
            return self.query.weight[0] * any_BP1
        if self.pooling == "mean":
            return (h_BPVD * valid_BPV1).sum(2) / valid_BPV1.sum(2).clamp(min=1)
        sign = 1.0 if self.pooling == "max" else -1.0
        best_BPD = (h_BPVD * sign).masked_fill(~valid_BPV1, float("-inf")).amax(2) * sign
        return best_BPD.masked_fill(~any_BP1, 0.0)


class LatentTransformer(Stack):
    """Turns patch vectors into latents, causally over patches. There is no final norm."""

    def __init__(self, config: BLTConfig) -> None:
        super().__init__(config.latent)
        width = config.cross_k * config.local_dim
        self.projection = linear(width, config.latent.dim) if config.latent_projection else None

    def forward(self, p_BPE: Tensor, rotation: Rotation, attends: Sequence[Attend]) -> Tensor:
        x_BPG = p_BPE if self.projection is None else self.projection(p_BPE)
        return self.run_layers(x_BPG, rotation, attends)


class LocalDecoder(Stack):
    """Turns byte states and latents into next-byte logits."""

    def __init__(self, config: BLTConfig) -> None:
        super().__init__(config.decoder)
        D, eps = config.local_dim, config.decoder.norm_eps
        self.k = config.cross_k
        self.patch_projection = linear(config.latent.dim, self.k * D) if config.decoder_projection else None
        self.cross = cross_layers(config.decoder_cross_layers, D, config.decoder_heads, eps)
        self.norm = RMSNorm(D, eps)
        self.output = linear(D, config.vocab_size)

    def patch_keys_values(self, g_BPG: Tensor) -> Tensor:
        """Keys and values of each patch for the cross-attention of all layers: [B, P, Y, 2, k, D]."""
        slices = g_BPG if self.patch_projection is None else self.patch_projection(g_BPG)
        c_BPkD = slices.unflatten(-1, (self.k, -1))
        kv_BPnD = torch.cat([x_BPkD for cross in crosses(self.cross) for x_BPkD in cross.keys_values(c_BPkD)], 2)
        kv_BPY2kD: Tensor = kv_BPnD.unflatten(2, (-1, 2, self.k))
        return kv_BPY2kD

    def forward(
        self,
        h_BND: Tensor,
        patch_kv_RY2kD: Tensor,
        row_BNW: Tensor,
        rotation: Rotation,
        attends: Sequence[Attend],
    ) -> Tensor:
        """Logits [B, N, 260], float32. `row` [B, N, W] indexes the R patches of the batch; -1 means no patch."""
        visible_BNJ = (row_BNW >= 0).repeat_interleave(self.k, -1) if row_BNW.shape[-1] > 1 else None
        row_BNW = row_BNW.clamp(min=0)
        for i, (layer, attend) in enumerate(zip(self.layers, attends, strict=True)):
            if i < len(self.cross):
                h_BND = self.read_patches(i, h_BND, patch_kv_RY2kD, row_BNW, visible_BNJ)
            h_BND = layer(h_BND, rotation, attend)
        logits: Tensor = self.output(self.norm(h_BND)).float()
        return logits

    def read_patches(
        self, i: int, h_BND: Tensor, patch_kv_RY2kD: Tensor, row_BNW: Tensor, visible_BNJ: Tensor | None
    ) -> Tensor:
        """Byte states after cross-attention i, each with the keys and values of its patches."""
        key, value = patch_kv_RY2kD[:, i][row_BNW].unbind(3)
        cross = crosses(self.cross)[i]
        return 2 * h_BND + cross.read_few(h_BND, key.flatten(2, 3), value.flatten(2, 3), visible_BNJ)


class BLT(nn.Module):
    def __init__(self, config: BLTConfig) -> None:
        super().__init__()
        self.config = config
        self.hash_embedding = HashEmbedding(config.hash, config.local_dim) if config.hash else None
        self.encoder = LocalEncoder(config)
        self.latent = LatentTransformer(config)
        self.decoder = LocalDecoder(config)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Truncated normal at three sigma (spec section 11)."""
        init_weights(self, generator)

    def layout(self, patch_lengths_BP: Tensor, n_tokens: int, max_patch: int) -> PatchLayout:
        c = self.config
        windows = {"encoder_window": c.encoder_cross_window, "decoder_window": c.decoder_cross_window}
        return patch_layout(patch_lengths_BP, n_tokens, max_patch, **windows)

    def forward(self, ids_BN: Tensor, patch_lengths_BP: Tensor, max_patch: int) -> Tensor:
        """Next-byte logits of whole rows, float32 [B, N, 260].

        ids [B, N] int64.  patch_lengths [B, P] int64: they sum to N + 1 in each row, the first is 1, and rows are
        padded with zeros.  max_patch: no patch but the last may be longer.
        """
        layout = self.layout(patch_lengths_BP, ids_BN.shape[1], max_patch)
        document_BN = document_ids(ids_BN)
        states = self.encode(ids_BN, document_BN)
        p_BPE = self.pool(states, layout)
        g_BPG = self.run_latent(p_BPE, patch_document_ids(ids_BN, layout))
        return self.decode(states[-1], g_BPG, layout, document_BN)

    def embed(self, ids_BN: Tensor) -> Tensor:
        return embed(self.encoder.byte_embedding, self.hash_embedding, ids_BN)

    def encode(self, ids_BN: Tensor, document_BN: Tensor) -> list[Tensor]:
        return self.encoder.byte_states(self.embed(ids_BN), *self._whole(self.encoder, document_BN))

    def pool(self, states_BND: Sequence[Tensor], layout: PatchLayout) -> Tensor:
        read = [(layout.gather(key), layout.gather(value)) for key, value in self.encoder.keys_values(states_BND)]
        return self.encoder.pool_read(layout.gather(states_BND[0]), read, layout.key_valid, layout.own_valid)

    def run_latent(self, p_BPE: Tensor, patch_document_BP: Tensor) -> Tensor:
        if not self.config.latent_document_mask:
            patch_document_BP = torch.zeros_like(patch_document_BP)
        out: Tensor = self.latent(p_BPE, *self._whole(self.latent, patch_document_BP))
        return out

    def decode(self, h_BND: Tensor, g_BPG: Tensor, layout: PatchLayout, document_BN: Tensor) -> Tensor:
        patch_kv = self.decoder.patch_keys_values(g_BPG)
        n_patches = patch_kv.shape[1]
        base_B11 = torch.arange(h_BND.shape[0], device=h_BND.device)[:, None, None] * n_patches
        row_BNW = torch.where(layout.decoder_row >= 0, layout.decoder_row + base_B11, -1)
        logits: Tensor = self.decoder(h_BND, patch_kv.flatten(0, 1), row_BNW, *self._whole(self.decoder, document_BN))
        return logits

    @staticmethod
    def _whole(stack: Stack, document_BN: Tensor) -> tuple[Rotation, list[Attend]]:
        attend = row_attend(document_BN, stack.config.window, stack.flex)
        return stack.rotary.first(document_BN.shape[1]), [attend] * len(stack.layers)
