"""The reference implementation's training format: a folder with `params.json` and `consolidated.pth`.

Facts from spec sections 4, 5, 13.1 and 13.3. Semantics are the reference's own, read row by row in float32, with
three deliberate differences. Its entropy loader ignores most of the entropy model's arguments; we honour them, and
fill in its forced window of 512 where the file names none. Its entropy calls start without context every 8,192
tokens; ours never do. `attn_impl` chooses kernels there, and with all but xformers loses the masks; we always mask.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from torch import Tensor

from blt.model import BLT, EntropyModel
from blt.model.config import BLTConfig, EntropyConfig, HashConfig, TransformerConfig
from blt.tensors import fill, read_tensors
from blt_runtime.errors import BltError, CheckpointError
from blt_runtime.patching import PatchRule

log = logging.getLogger("blt.adapters")
PARAMS, WEIGHTS = "params.json", "consolidated.pth"
HASH_TABLES = "hash_embedding.tables.weight"
Weights = Mapping[str, Tensor]

# ours -> theirs; the first that matches is applied
RENAMES = (
    (r"encoder\.byte_embedding\.", "local_encoder.tok_embeddings."),
    (r"(encoder|decoder)\.patch_projection\.", r"local_\1.patch_embedding_projection."),
    (r"(encoder|decoder)\.cross\.(\d+)\.(q|kv)_norm\.", r"local_\1.cross_attn_layers.\2.cross_attn_norm_\3."),
    (r"(encoder|decoder)\.cross\.(\d+)\.", r"local_\1.cross_attn_layers.\2."),
    (r"latent\.projection\.", "global_transformer.token_embedding_projection."),
    (r"latent\.", "global_transformer."),
    (r"(encoder|decoder)\.", r"local_\1."),
)
ENTROPY_RENAMES = ((r"byte_embedding\.", "tok_embeddings."),)
UNUSED = re.compile(r"local_(encoder|decoder)\.token_embedding_projection\.weight|.*rope.*freqs.*")
"""Tensors that the reference stores and never reads (spec sections 11 and 13.3)."""


def reference_name(name: str, entropy: bool = False) -> str:
    """The reference's name of one of our parameters (hash tables apart: they are split, see `hash_table_name`)."""
    for pattern, replacement in ENTROPY_RENAMES if entropy else RENAMES:
        renamed, n = re.subn("^" + pattern, replacement, name)
        if n:
            return renamed
    return name


def hash_table_name(table: int) -> str:
    return f"encoder_hash_tok_embedding.{table}.weight"


class Arguments(BaseModel):
    """The arguments that decide what the weights compute. The files hold many more, for training; those are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class ModelArguments(Arguments):
    dim_local_encoder: PositiveInt
    dim_local_decoder: PositiveInt
    dim_global: PositiveInt
    n_layers_local_encoder: PositiveInt
    n_layers_local_decoder: PositiveInt
    n_layers_global: PositiveInt
    n_heads_local_encoder: PositiveInt
    n_heads_local_decoder: PositiveInt
    n_heads_global: PositiveInt
    vocab_size: PositiveInt = 260
    norm_eps: float = 1e-5
    rope_theta: float | None = None
    max_encoder_seq_length: PositiveInt | None = None
    max_seqlen: PositiveInt | None = None
    local_attention_window_len: PositiveInt | None = None
    cross_attn_k: PositiveInt | None = None
    cross_attn_nheads: PositiveInt | None = None
    cross_attn_all_layers_encoder: bool | None = None
    cross_attn_all_layers_decoder: bool | None = None
    cross_attn_window_encoder: PositiveInt | None = None
    cross_attn_window_decoder: PositiveInt | None = None
    downsampling_by_pooling: Literal["max", "mean", "min"] | None = None
    encoder_hash_byte_group_size: list[PositiveInt] | None = None
    encoder_hash_byte_group_vocab: PositiveInt = 30000
    encoder_hash_byte_group_nb_functions: PositiveInt | None = None
    attn_bias_type: Literal["block_causal", "causal"] | None = None
    attn_impl: str | None = None
    patch_in_forward: bool = False
    patching_mode: str | None = None
    max_patch_length: PositiveInt | None = None
    # what we have only one form of
    use_rope: Literal[True] = True
    cross_attn_encoder: Literal[True] | None = True
    cross_attn_decoder: Literal[True] | None = True
    cross_attn_init_by_pooling: Literal[True] = True
    use_local_encoder_transformer: Literal[True] = True
    weight_tying: Literal[False] = False


class EntropyArguments(Arguments):
    dim: PositiveInt
    n_layers: PositiveInt
    n_heads: PositiveInt
    vocab_size: PositiveInt = 260
    norm_eps: float = 1e-5
    rope_theta: float | None = None
    sliding_window: PositiveInt | None = None
    max_seqlen: PositiveInt | None = None


class PatcherArguments(Arguments):
    patching_mode: Literal["entropy", "space", "static", "byte", "bpe"] = "entropy"
    threshold: float | None = Field(default=None, allow_inf_nan=False)
    threshold_add: float | None = Field(default=None, allow_inf_nan=False)
    monotonicity: bool = False
    max_patch_length: PositiveInt | None = None
    patch_size: float | None = None


Section = TypeVar("Section", bound=Arguments)


def is_reference(path: Path) -> bool:
    return (path / PARAMS).is_file()


def load(path: Path) -> tuple[BLT | None, EntropyModel | None, PatchRule | None]:
    """What a folder of this format holds: a BLT and its rule, or an entropy model. Raises CheckpointError."""
    params, weights = read_params(path), read_weights(path)
    try:
        if params.get("train_entropy_model"):
            return None, _entropy_model(params, weights, path), None
        rule, config = patch_rule(params), blt_config(params, weights)
    except CheckpointError:
        raise
    except ValidationError as error:  # the configurations' own checks
        raise CheckpointError(f"{path / PARAMS}: {error.errors()[0]['msg']}") from None
    except BltError as error:
        raise CheckpointError(f"{path / PARAMS}: {error}") from None
    with torch.device("meta"):
        names = list(BLT(config).state_dict())
    state = our_state(weights, names, config.hash.n_tables if config.hash else 0)
    return fill(BLT(config), state, path), None, rule


def _entropy_model(params: Mapping[str, Any], weights: Weights, path: Path) -> EntropyModel:
    config = entropy_config(params, weights)
    with torch.device("meta"):
        names = list(EntropyModel(config).state_dict())
    return fill(EntropyModel(config), our_state(weights, names, 0, entropy=True), path)


def read_params(path: Path) -> dict[str, Any]:
    try:
        params = json.loads((path / PARAMS).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path / PARAMS}: {error}") from None
    if not isinstance(params, dict):
        raise CheckpointError(f"{path / PARAMS} is not a JSON object")
    return params


def read_weights(path: Path) -> dict[str, Tensor]:
    content = read_tensors(path / WEIGHTS)
    weights = content.get("model", content)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path / WEIGHTS} holds no state dict under the key 'model'")
    return weights


def _section(kind: type[Section], params: Mapping[str, Any], *keys: str) -> Section:
    """One section of params.json, checked. Raises CheckpointError that names the argument."""
    values: Any = params
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    where = ".".join(keys)
    if not isinstance(values, dict):
        raise CheckpointError(f"{PARAMS} has no section {where!r}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in (where, *first["loc"]))
        raise CheckpointError(f"{PARAMS}: {name}: {first['msg']}; it is {first['input']!r}") from None


def blt_config(params: Mapping[str, Any], weights: Weights) -> BLTConfig:
    args = _section(ModelArguments, params, "model")
    if args.attn_impl not in (None, "xformers"):
        log.warning("%s names attn_impl %s; windows and documents are masked as with xformers", PARAMS, args.attn_impl)

    def stack(
        name: str, dim: int, layers: int, heads: int, length: int | None, window: int | None = None
    ) -> TransformerConfig:
        return TransformerConfig(
            dim=dim,
            n_layers=layers,
            norm_eps=args.norm_eps,
            rope_theta=args.rope_theta or 10000.0,
            max_seqlen=length or 8192,
            window=window,
            **_shapes(weights, f"{name}.layers.0.", heads),
        )

    window, length = args.local_attention_window_len, args.max_encoder_seq_length
    encoder = (args.dim_local_encoder, args.n_layers_local_encoder, args.n_heads_local_encoder, length)
    latent = (args.dim_global, args.n_layers_global, args.n_heads_global, args.max_seqlen)
    decoder = (args.dim_local_decoder, args.n_layers_local_decoder, args.n_heads_local_decoder, length)
    return BLTConfig(
        vocab_size=args.vocab_size,
        encoder=stack("local_encoder", *encoder, window),
        latent=stack("global_transformer", *latent),
        decoder=stack("local_decoder", *decoder, window),
        cross_k=args.cross_attn_k or 1,
        encoder_cross_heads=args.cross_attn_nheads,
        decoder_cross_heads=args.cross_attn_nheads,
        encoder_cross_all_layers=bool(args.cross_attn_all_layers_encoder),
        decoder_cross_all_layers=bool(args.cross_attn_all_layers_decoder),
        encoder_cross_window=args.cross_attn_window_encoder or 1,
        decoder_cross_window=args.cross_attn_window_decoder or 1,
        decoder_projection="local_decoder.patch_embedding_projection.weight" in weights,
        pooling=args.downsampling_by_pooling or "max",
        hash=_hash_config(args),
        latent_document_mask=args.attn_bias_type == "block_causal",
    )


def _shapes(weights: Weights, layer: str, heads: int) -> dict[str, int]:
    """Head counts and widths from a layer's weights: the reference derives them from one of several arguments each,
    and the weights are what counts."""
    rows = {}
    for part in ("attention.wq", "attention.wk", "feed_forward.w1"):
        name = f"{layer}{part}.weight"
        if name not in weights or weights[name].ndim != 2:
            raise CheckpointError(f"the checkpoint has no matrix {name}")
        rows[part] = weights[name].shape[0]
    head_dim = rows["attention.wq"] // heads
    if head_dim == 0 or rows["attention.wq"] % heads or rows["attention.wk"] % head_dim:
        raise CheckpointError(f"{layer}attention.wq.weight and wk do not divide into {heads} heads")
    return {
        "n_heads": heads,
        "n_kv_heads": rows["attention.wk"] // head_dim,
        "head_dim": head_dim,
        "ffn_dim": rows["feed_forward.w1"],
    }


def _hash_config(args: ModelArguments) -> HashConfig | None:
    if not args.encoder_hash_byte_group_size:
        return None
    return HashConfig(
        sizes=tuple(args.encoder_hash_byte_group_size),
        rows=args.encoder_hash_byte_group_vocab,
        functions=args.encoder_hash_byte_group_nb_functions or 1,
    )


def entropy_config(params: Mapping[str, Any], weights: Weights) -> EntropyConfig:
    args = _section(EntropyArguments, params, "entropy_model" if params.get("entropy_model") else "model")
    return EntropyConfig(
        vocab_size=args.vocab_size,
        dim=args.dim,
        n_layers=args.n_layers,
        norm_eps=args.norm_eps,
        rope_theta=args.rope_theta or 10000.0,
        window=args.sliding_window or 512,
        max_seqlen=max(8192, args.max_seqlen or 0),
        **_shapes(weights, "layers.0.", args.n_heads),
    )


def patch_rule(params: Mapping[str, Any]) -> PatchRule:
    """The rule of `data.patcher_args`, or of the model where it patches by itself (spec section 5)."""
    model = _section(ModelArguments, params, "model")
    if model.patch_in_forward:
        if model.patching_mode not in ("space", "byte"):
            raise CheckpointError(f"{PARAMS}: model.patch_in_forward works for space and byte patching only")
        return PatchRule.from_dict({"scheme": model.patching_mode, "max_patch_length": model.max_patch_length})
    args = _section(PatcherArguments, params, "data", "patcher_args")
    rule: dict[str, Any] = {"scheme": args.patching_mode, "max_patch_length": args.max_patch_length}
    if args.patching_mode == "entropy":
        if args.threshold is None:
            raise CheckpointError(f"{PARAMS}: data.patcher_args has no threshold; entropy patching needs one")
        # monotonicity wins over threshold_add
        add = None if args.monotonicity else args.threshold_add
        rule |= {"threshold": args.threshold, "threshold_add": add, "monotonic": args.monotonicity}
    if args.patching_mode == "static":
        if args.patch_size is None or args.patch_size != int(args.patch_size):
            raise CheckpointError(f"{PARAMS}: static patching needs a whole patch_size, not {args.patch_size}")
        rule["patch_size"] = int(args.patch_size)
    return PatchRule.from_dict(rule)


def our_state(
    weights: Mapping[str, Tensor], names: list[str], n_tables: int, entropy: bool = False
) -> dict[str, Tensor]:
    """State dict under our names; every missing or unknown tensor is listed at once."""
    theirs = {reference_name(name, entropy): name for name in names if name != HASH_TABLES}
    tables = [hash_table_name(table) for table in range(n_tables)]
    missing = [name for name in [*theirs, *tables] if name not in weights]
    unknown = [name for name in weights if name not in theirs and name not in tables and not UNUSED.fullmatch(name)]
    if missing or unknown:
        parts = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
        raise CheckpointError("tensors do not fit the configuration: " + "; ".join(parts))
    state = {ours: weights[name].float() for name, ours in theirs.items()}
    if tables:
        state[HASH_TABLES] = torch.cat([weights[name].float() for name in tables])
    return state


def reference_state(state: Mapping[str, Tensor], n_tables: int, entropy: bool = False) -> dict[str, Tensor]:
    """The same tensors (or their gradients) under the reference's names."""
    named = {reference_name(name, entropy): tensor for name, tensor in state.items() if name != HASH_TABLES}
    if n_tables:
        chunks = state[HASH_TABLES].chunk(n_tables)
        named |= {hash_table_name(table): chunk for table, chunk in enumerate(chunks)}
    return named
