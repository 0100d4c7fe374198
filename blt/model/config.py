"""Shapes of the three stages, as frozen configurations.

Every quantity that is derived from a shape (parameters, FLOPs per byte, cache bytes) is a method here, so that
`inspect`, `--dry-run` and the benchmarks report the same. YAML is read in `blt.train.config`.
"""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from blt_runtime.bundle.spec import LONGEST_HASH
from blt_runtime.ids import VOCAB


class Frozen(BaseModel):
    """Immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would read True as 1."""
        if isinstance(value, bool) and bool not in _types(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError(f"must be a number, not {value}")
        return value


def _types(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of `X | None`."""
    return get_args(annotation) or (annotation,)


def swiglu_dim(dim: int, multiple_of: int = 256, multiplier: float | None = 1.0) -> int:
    """Hidden width of the feed-forward layers: 8/3 of `dim`, rounded up (both casts truncate, as published)."""
    hidden = int(2 * 4 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)


class TransformerConfig(Frozen):
    """One stack of pre-norm blocks. `window` counts visible keys, the query's own position included."""

    dim: int = Field(gt=0)
    n_layers: int = Field(ge=1)
    n_heads: int = Field(ge=1)
    n_kv_heads: int | None = Field(default=None, ge=1)
    head_dim: int | None = Field(default=None, ge=2)
    ffn_dim: int | None = Field(default=None, ge=1)
    norm_eps: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    rope_theta: float = Field(default=500000.0, gt=0, allow_inf_nan=False)
    window: int | None = Field(default=None, ge=1)
    max_seqlen: int = Field(default=8192, ge=2, le=1 << 20)  # the rotary tables have as many rows

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not divisible by n_heads {self.n_heads}")
        if self.head_size % 2:
            raise ValueError(f"head size {self.head_size} is odd; rotary embedding rotates pairs, so it must be even")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.kv_heads}")
        return self

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        return self.ffn_dim or swiglu_dim(self.dim)

    def layer_params(self) -> int:
        """Weights of one block."""
        attention = self.dim * self.head_size * (2 * self.n_heads + 2 * self.kv_heads)
        return attention + 3 * self.dim * self.hidden_dim + 2 * self.dim

    def matmul_params(self) -> int:
        """Weights of the matrix products of all blocks, once per position."""
        return self.n_layers * (self.layer_params() - 2 * self.dim)

    def attention_flops(self, keys: float) -> float:
        """FLOPs of q k^T and of the weighted sum over `keys` keys, in all layers, for one position."""
        return 4.0 * self.n_layers * self.n_heads * self.head_size * keys

    def visible_keys(self, context: int) -> float:
        """Mean number of keys that a position attends to in a row of `context` positions."""
        window = min(self.window or context, context)
        return window - window * (window - 1) / (2 * context)

    def cache_bytes(self, capacity: int, itemsize: int = 4) -> int:
        """Bytes of the key and value caches of one stream, with `capacity` slots in every layer."""
        return 2 * self.n_layers * self.kv_heads * capacity * self.head_size * itemsize


class HashConfig(Frozen):
    """Hashed n-gram embeddings: a table of `rows` rows per hash function and n-gram size (paper, section 3.2.1)."""

    sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    rows: int = Field(ge=1, le=2**31 - 1)
    functions: int = Field(default=1, ge=1, le=11)

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        if not self.sizes or min(self.sizes) < 1 or max(self.sizes) > LONGEST_HASH:
            raise ValueError(f"hash sizes must be a non-empty list of n-gram lengths, each from 1 to {LONGEST_HASH}")
        return self

    @property
    def n_tables(self) -> int:
        return self.functions * len(self.sizes)

    def params(self, dim: int) -> int:
        """Weights of all tables, whose rows have `dim` numbers."""
        return self.n_tables * self.rows * dim


class EntropyConfig(TransformerConfig):
    """The byte-level language model whose next-byte entropies decide where patches start.

    With `hash`, rows of hashed n-grams are added to the byte embeddings, as in a BLT's encoder. They replace layers: a
    model with a receptive field that small could be a lookup table (paper, section 4.2), so `n_layers` may be 0.
    """

    n_layers: int = Field(ge=0)
    vocab_size: int = Field(default=VOCAB, ge=1, le=1 << 24)
    window: int | None = Field(default=512, ge=1)
    rope_theta: float = Field(default=10000.0, gt=0, allow_inf_nan=False)
    hash: HashConfig | None = None

    @model_validator(mode="after")
    def _width(self) -> Self:
        if self.hash is not None and self.dim < 2:
            raise ValueError("dim must be at least 2 with a hash: its tables have rows of that width")
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A model without hash n-grams is written as before they existed: earlier releases read it, and keys that are
        made of a configuration stay the same."""
        written: dict[str, Any] = dump(self)
        if self.hash is None:
            del written["hash"]
        return written

    def n_params(self) -> int:
        tables = self.hash.params(self.dim) if self.hash else 0
        return self.n_layers * self.layer_params() + self.dim + 2 * self.vocab_size * self.dim + tables

    def weights_read(self) -> int:
        """Weights read per generated byte: every matrix, one row of the embedding and one of each hash table."""
        rows = 1 + (self.hash.n_tables if self.hash else 0)
        return self.n_layers * self.layer_params() + (1 + self.vocab_size + rows) * self.dim

    def flops_per_byte(self, context: int = 2048) -> float:
        """Forward FLOPs of one byte in a row of `context` bytes."""
        weights = self.matmul_params() + self.vocab_size * self.dim
        return 2.0 * weights + self.attention_flops(self.visible_keys(context))


class BLTConfig(Frozen):
    """Local encoder, latent transformer and local decoder. The encoder and the decoder have the same width."""

    vocab_size: int = Field(default=VOCAB, ge=1, le=1 << 24)
    encoder: TransformerConfig
    latent: TransformerConfig
    decoder: TransformerConfig
    cross_k: int = Field(default=2, ge=1)
    encoder_cross_heads: int | None = Field(default=None, ge=1)
    decoder_cross_heads: int | None = Field(default=None, ge=1)
    encoder_cross_all_layers: bool = False
    decoder_cross_all_layers: bool = True
    encoder_cross_window: int = Field(default=1, ge=1)
    decoder_cross_window: int = Field(default=1, ge=1)
    decoder_projection: bool = True
    pooling: Literal["max", "mean", "min", "learned"] = "max"
    hash: HashConfig | None = None
    latent_document_mask: bool = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.encoder.dim != self.decoder.dim:
            raise ValueError(
                f"encoder.dim {self.encoder.dim} and decoder.dim {self.decoder.dim} must be equal: "
                "the decoder starts from the encoder's byte states"
            )
        for name, heads in (("encoder", self.encoder_heads), ("decoder", self.decoder_heads)):
            if self.encoder.dim % heads:
                raise ValueError(f"{name}.dim {self.encoder.dim} is not divisible by its {heads} cross-attention heads")
        if self.hash is not None and self.encoder.dim < 2:
            raise ValueError("encoder.dim must be at least 2 with a hash: its tables have rows of that width")
        if not self.decoder_projection and (self.latent.dim != self.decoder.dim or self.cross_k != 1):
            raise ValueError("decoder_projection may be off only if latent.dim equals decoder.dim and cross_k is 1")
        return self

    @property
    def local_dim(self) -> int:
        return self.encoder.dim

    @property
    def encoder_heads(self) -> int:
        return self.encoder_cross_heads or self.encoder.n_heads

    @property
    def decoder_heads(self) -> int:
        return self.decoder_cross_heads or self.decoder.n_heads

    @property
    def encoder_cross_layers(self) -> int:
        return self.encoder.n_layers if self.encoder_cross_all_layers else 1

    @property
    def decoder_cross_layers(self) -> int:
        return self.decoder.n_layers if self.decoder_cross_all_layers else 1

    @property
    def latent_projection(self) -> bool:
        return self.cross_k * self.local_dim != self.latent.dim

    def params(self) -> dict[str, int]:
        """Weights of each part."""
        D, E = self.local_dim, self.cross_k * self.local_dim
        cross = 4 * D * D + 2 * D
        tables = self.hash.params(D) if self.hash else 0
        encoder = self.encoder.n_layers * self.encoder.layer_params() + self.vocab_size * D + E * D
        decoder = self.decoder.n_layers * self.decoder.layer_params() + D + self.vocab_size * D
        return {
            "hash tables": tables,
            "local encoder": encoder + self.encoder_cross_layers * cross + (self.pooling == "learned") * D,
            "latent transformer": self.latent.n_layers * self.latent.layer_params()
            + self.latent_projection * E * self.latent.dim,
            "local decoder": decoder
            + self.decoder_cross_layers * cross
            + self.decoder_projection * E * self.latent.dim,
        }

    def n_params(self) -> int:
        return sum(self.params().values())

    def weights_read(self, patch_size: float) -> dict[str, float]:
        """Weights of each part that are read per generated byte at batch size 1.

        Of a hash table one row is read. Weights that are read once per patch are divided by the patch size.
        """
        D, parts = self.local_dim, self.params()
        pooling = self.cross_k * D * D + self.encoder_cross_layers * (4 * D * D + 2 * D)
        patch_kv = self.decoder_projection * self.cross_k * D * self.latent.dim
        patch_kv += self.decoder_cross_layers * (2 * D * D + D)
        per_patch = pooling + parts["latent transformer"] + patch_kv
        return {
            "hash tables": float(self.hash.n_tables * D if self.hash else 0),
            "local encoder": float(parts["local encoder"] - pooling - (self.vocab_size - 1) * D),
            "latent transformer": per_patch / patch_size,
            "local decoder": float(parts["local decoder"] - patch_kv),
        }

    def flops(self, patch_size: float, context: int = 2048) -> dict[str, float]:
        """Forward FLOPs per byte of each part, for rows of `context` bytes and patches of `patch_size` bytes.

        FLOPs that are spent once per patch are divided by the patch size. Norms and softmax are not counted.
        """
        D, k = self.local_dim, self.cross_k
        per_patch = 1.0 / patch_size
        patches = max(1, round(context / patch_size))
        byte_kv, patch_q = 2.0 * 2 * D * D, 2.0 * 2 * k * D * D
        encoder = 2.0 * self.encoder.matmul_params() + self.encoder.attention_flops(self.encoder.visible_keys(context))
        pooling = 2.0 * k * D * D * per_patch
        pooling += self.encoder_cross_layers * (byte_kv + patch_q * per_patch + 4.0 * k * D * self.encoder_cross_window)
        latent = 2.0 * (self.latent.matmul_params() + self.latent_projection * k * D * self.latent.dim)
        latent += self.latent.attention_flops(self.latent.visible_keys(patches))
        decoder = 2.0 * (self.decoder.matmul_params() + self.vocab_size * D)
        decoder += self.decoder.attention_flops(self.decoder.visible_keys(context))
        decoder += self.decoder_cross_layers * (
            byte_kv + 4.0 * k * D * self.decoder_cross_window + byte_kv * k * per_patch
        )
        decoder += self.decoder_projection * 2.0 * k * D * self.latent.dim * per_patch
        return {
            "local encoder": encoder + pooling,
            "latent transformer": latent * per_patch,
            "local decoder": decoder,
        }

    def flops_per_byte(self, patch_size: float, context: int = 2048) -> float:
        return sum(self.flops(patch_size, context).values())
