"""The token-level baseline: a Llama-style transformer over tokens of a byte-level BPE vocabulary.

It has the same blocks as every other stack (RMSNorm, rotary embedding, SwiGLU, a document mask), full causal attention
and its own vocabulary. Ids 0 to 3 have the same meaning as for bytes, so that BOS, EOS and the document mask are the
same; token t of the tokenizer is id 4 + t.
"""

from __future__ import annotations

from pydantic import Field

from blt.model.config import EntropyConfig
from blt.model.entropy import EntropyModel


class TokenConfig(EntropyConfig):
    """A stack over tokens. `vocab_size` includes the four special ids; lengths count tokens."""

    window: int | None = Field(default=None, ge=1)
    rope_theta: float = Field(default=500000.0, gt=0, allow_inf_nan=False)

    def flops_per_byte(self, context: int = 2048, bytes_per_token: float = 1.0) -> float:
        """Forward FLOPs of one byte in rows of `context` tokens, each worth `bytes_per_token` bytes of text."""
        return super().flops_per_byte(context) / bytes_per_token


class TokenModel(EntropyModel):
    """Next-token logits of whole rows: ids [B, N] to float32 [B, N, V]."""

    def __init__(self, config: TokenConfig) -> None:
        super().__init__(config)
        self.config: TokenConfig = config
