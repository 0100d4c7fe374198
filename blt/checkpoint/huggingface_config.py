"""`config.json` of a Hugging Face `BltForCausalLM`, read as our configurations and patch rule.

The facts are in spec sections 12 and 13.4 and in transformers 5.23 (`models/blt`). Its defaults are repeated here,
because files of older versions leave out what equals the default. D1 to D11 are the differences between
facebookresearch/blt and transformers, numbered in docs/spec.md, section 12.

A file means what facebookresearch/blt would compute: rows are masked at an EOS, which transformers never does (D2). A
file is refused if transformers computes something that neither facebookresearch/blt nor this project computes.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from blt.checkpoint.source import parse
from blt.model.config import BLTConfig, EntropyConfig, HashConfig, TransformerConfig
from blt_runtime.errors import BltError, CheckpointError, shown
from blt_runtime.patching import PatchRule

SPEC = "docs/spec.md, section 12"
ORIGINAL = "use the checkpoint in facebookresearch/blt's format"
Ours = TypeVar("Ours", bound=TransformerConfig)


class Arguments(BaseModel):
    """The fields that decide what the weights compute. Others, for training and generation, are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Rope(Arguments):
    rope_type: str | None = None
    type: str | None = None  # the older spelling
    rope_theta: PositiveFloat | None = None


class Stack(Arguments):
    """The fields that the four sub-configurations share."""

    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: NonNegativeInt | None = None
    head_dim: PositiveInt | None = None
    intermediate_size: NonNegativeInt | None = None
    max_position_embeddings: PositiveInt
    rms_norm_eps: float = 1e-5
    hidden_act: Literal["silu"] = "silu"
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None  # older versions have this and rope_theta instead of rope_parameters
    rope_theta: PositiveFloat | None = None
    default_theta: PositiveFloat = 500000.0

    def values(self, window: int | None) -> dict[str, Any]:
        """The values of our configuration. Raises ValueError for a form that is not supported."""
        heads, dim = self.num_attention_heads, self.hidden_size
        if self.head_dim not in (None, dim // heads):
            raise ValueError(f"head_dim {self.head_dim} is not hidden_size {dim} // num_attention_heads {heads}")
        return {
            "dim": dim,
            "n_layers": self.num_hidden_layers,
            "n_heads": heads,
            "n_kv_heads": self.num_key_value_heads or heads,
            "head_dim": dim // heads if dim % heads else None,
            "ffn_dim": self.intermediate_size or int(8 * dim / 3),
            "norm_eps": self.rms_norm_eps,
            "rope_theta": self._theta(),
            "window": window,
            "max_seqlen": self.max_position_embeddings,
        }

    def _theta(self) -> float:
        rope = self.rope_scaling or self.rope_parameters or Rope()
        kind = rope.rope_type or rope.type or "default"
        if kind != "default":
            raise ValueError(f"rope_type {shown(kind)} is a scaled rotary embedding; only 'default' is supported")
        return rope.rope_theta or self.rope_theta or self.default_theta


class Encoder(Stack):
    hidden_size: PositiveInt = 1024
    num_hidden_layers: PositiveInt = 1
    num_attention_heads: PositiveInt = 16
    max_position_embeddings: PositiveInt = 24576
    vocab_size: PositiveInt = 260
    cross_attn_all_layers: bool | None = False
    cross_attn_k: PositiveInt = 2


class Decoder(Stack):
    hidden_size: PositiveInt = 1024
    num_hidden_layers: PositiveInt = 9
    num_attention_heads: PositiveInt = 16
    intermediate_size: NonNegativeInt | None = 2816
    max_position_embeddings: PositiveInt = 24576
    cross_attn_all_layers: bool | None = True
    cross_attn_k: PositiveInt = 2
    hidden_size_global: PositiveInt = 2048


class Global(Stack):
    hidden_size: PositiveInt = 2048
    num_hidden_layers: PositiveInt = 25
    num_attention_heads: PositiveInt = 16
    intermediate_size: NonNegativeInt | None = 5632
    max_position_embeddings: PositiveInt = 4096


class Patcher(Stack):
    hidden_size: PositiveInt = 768
    num_hidden_layers: PositiveInt = 14
    num_attention_heads: PositiveInt = 12
    intermediate_size: NonNegativeInt | None = 2048
    max_position_embeddings: PositiveInt = 8192
    vocab_size: PositiveInt = 260
    sliding_window: PositiveInt | None = 512
    default_theta: PositiveFloat = 10000.0

    def values(self, window: int | None) -> dict[str, Any]:
        return super().values(window) | {"vocab_size": self.vocab_size}


class HuggingFaceConfig(Arguments):
    """The whole file."""

    vocab_size: PositiveInt = 260
    patch_in_forward: bool | None = True
    patch_size: float | None = 4
    patching_mode: str | None = "entropy"
    patching_threshold: float | None = 1.335442066192627
    max_patch_length: int | None = None
    local_attention_window_len: PositiveInt | None = 512
    cross_attn_k: PositiveInt = 2
    encoder_hash_byte_group_size: list[PositiveInt] | None = None
    encoder_hash_byte_group_vocab: PositiveInt = 500002
    encoder_hash_byte_group_nb_functions: NonNegativeInt = 1
    tie_word_embeddings: Literal[False] = False  # the only supported form
    encoder_config: Encoder = Field(default_factory=Encoder)
    decoder_config: Decoder = Field(default_factory=Decoder)
    global_config: Global = Field(default_factory=Global)
    patcher_config: Patcher = Field(default_factory=Patcher)

    def blt(self) -> BLTConfig:
        """The configuration of the BLT. Raises ValueError (or pydantic's subclass) if sizes do not fit."""
        encoder, decoder = self.encoder_config, self.decoder_config
        self._check_sizes()
        if encoder.cross_attn_all_layers and encoder.num_hidden_layers > 1:
            raise ValueError(
                f"encoder_config.cross_attn_all_layers with {encoder.num_hidden_layers} layers: transformers discards "
                f"all but the last layer's result, facebookresearch/blt does not ({SPEC}); {ORIGINAL}"
            )
        window = self.local_attention_window_len
        return BLTConfig(
            vocab_size=self.vocab_size,
            encoder=_ours(TransformerConfig, "encoder_config", encoder, window),
            latent=_ours(TransformerConfig, "global_config", self.global_config, None),
            decoder=_ours(TransformerConfig, "decoder_config", decoder, window),
            cross_k=self.cross_attn_k,
            decoder_cross_all_layers=bool(decoder.cross_attn_all_layers),
            hash=self._hash(),
        )

    def _check_sizes(self) -> None:
        encoder, decoder = self.encoder_config, self.decoder_config
        pairs = {
            "encoder_config.cross_attn_k": (encoder.cross_attn_k, "cross_attn_k", self.cross_attn_k),
            "decoder_config.cross_attn_k": (decoder.cross_attn_k, "cross_attn_k", self.cross_attn_k),
            "encoder_config.vocab_size": (encoder.vocab_size, "vocab_size", self.vocab_size),
            "decoder_config.hidden_size": (decoder.hidden_size, "encoder_config.hidden_size", encoder.hidden_size),
            "decoder_config.hidden_size_global": (
                decoder.hidden_size_global, "global_config.hidden_size", self.global_config.hidden_size,
            ),
        }  # fmt: skip
        for name, (value, other, wanted) in pairs.items():
            if value != wanted:
                raise ValueError(f"{name} {value} does not fit {other} {wanted}")

    def _hash(self) -> HashConfig | None:
        if self.encoder_hash_byte_group_nb_functions == 0:
            return None
        return HashConfig(
            sizes=tuple(self.encoder_hash_byte_group_size or (3, 4, 5, 6, 7, 8)),
            rows=self.encoder_hash_byte_group_vocab,
            functions=self.encoder_hash_byte_group_nb_functions,
        )

    def entropy(self) -> EntropyConfig | None:
        """The configuration of the entropy model, or None without a patcher. Raises ValueError if sizes do not fit."""
        if not self.patch_in_forward:
            return None
        patcher = self.patcher_config
        return _ours(EntropyConfig, "patcher_config", patcher, patcher.sliding_window)

    def patch_rule(self) -> PatchRule:
        """The patch rule. Raises RuleError or ValueError for settings that transformers silently runs differently."""
        mode = self.patching_mode
        if mode == "byte":
            return PatchRule("byte")
        if mode != "entropy":
            raise ValueError(
                f"patching_mode {shown(mode)} means one patch per byte in transformers ({SPEC}): write 'byte' if "
                f"the model was trained like this; if not, {ORIGINAL}"
            )
        if self.patch_size is None:
            raise ValueError(
                f"patch_size null means one patch per byte in transformers ({SPEC}): write 4, or mode 'byte'"
            )
        if self.max_patch_length is not None:
            raise ValueError(
                f"max_patch_length {self.max_patch_length}: transformers splits patches without the next byte and "
                f"computes the last position wrongly ({SPEC}); write null, or {ORIGINAL}"
            )
        if self.patching_threshold is None:
            raise ValueError("patching_threshold is null; entropy patching needs one")
        return PatchRule("entropy", threshold=self.patching_threshold)


def _ours(kind: type[Ours], section: str, stack: Stack, window: int | None) -> Ours:
    try:
        return kind.model_validate(stack.values(window))
    except ValidationError as error:
        raise ValueError(f"{section}: {_message(error)}") from None
    except ValueError as error:
        raise ValueError(f"{section}: {error}") from None


def _message(error: ValidationError) -> str:
    first = error.errors()[0]
    field = "".join(f"{part}: " for part in first["loc"])
    return field + first["msg"].removeprefix("Value error, ")


def parse_config(values: Any, file: str) -> HuggingFaceConfig:
    """The content of `file`, validated. Raises CheckpointError that names the field."""
    if isinstance(values, dict):  # a section that is null has the defaults
        values = {key: v for key, v in values.items() if v is not None or not key.endswith("_config")}
    return parse(HuggingFaceConfig, values, file)


def our_configs(config: HuggingFaceConfig, file: str) -> tuple[BLTConfig, EntropyConfig | None, PatchRule]:
    """Our configurations and patch rule. Raises CheckpointError for sizes that do not fit and unsupported forms."""
    try:
        return config.blt(), config.entropy(), config.patch_rule()
    except ValidationError as error:
        raise CheckpointError(f"{file}: {_message(error)}") from None
    except (ValueError, BltError) as error:
        raise CheckpointError(f"{file}: {error}") from None
