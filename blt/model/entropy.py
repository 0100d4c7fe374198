"""The entropy model: a small byte-level language model whose entropies say how hard the next byte is to predict.

Letters: B rows, N tokens, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blt.model.config import EntropyConfig
from blt.model.hashing import HashEmbedding, embed
from blt.model.init import init_weights
from blt.model.layers import RMSNorm, Stack, linear
from blt.model.masks import document_ids
from blt.model.windows import row_attend


def entropy_of(logits_BNV: Tensor) -> Tensor:
    """Entropy in nats of each next-byte distribution, float32 [B, N] (spec section 4).

    Computed in float32. Logits in bfloat16, which only `BFloat16EntropyModel` returns, are processed in bfloat16.
    """
    log_p_BNV = (logits_BNV if logits_BNV.dtype == torch.bfloat16 else logits_BNV.float()).log_softmax(-1)
    return -(log_p_BNV.exp() * log_p_BNV).sum(-1).float()


class EntropyModel(Stack):
    def __init__(self, config: EntropyConfig) -> None:
        super().__init__(config)
        self.config: EntropyConfig = config
        self.hash_embedding = HashEmbedding(config.hash, config.dim) if config.hash else None
        self.byte_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = linear(config.dim, config.vocab_size)

    def forward(self, ids_BN: Tensor, reset_newlines: bool = False) -> Tensor:
        """Next-byte logits of whole rows, float32 [B, N, V].

        With `reset_newlines` a newline ends the context of the attention, too (paper, section 4.4). The n-grams of a
        model with `hash` are those of the BLT's encoder: they end at nothing but the start of the row.
        """
        attend = row_attend(document_ids(ids_BN, reset_newlines), self.config.window, self.flex)
        rotation = self.rotary.first(ids_BN.shape[1])
        h_BND = self.run_layers(self.embed(ids_BN), rotation, [attend] * len(self.layers))
        logits: Tensor = self.output(self.norm(h_BND)).float()
        return logits

    def embed(self, ids_BN: Tensor) -> Tensor:
        return embed(self.byte_embedding, self.hash_embedding, ids_BN)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Truncated normal at three sigma (spec section 11)."""
        init_weights(self, generator)
