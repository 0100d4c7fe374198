"""The reference implementation's training format: a folder with `params.json` and `consolidated.pth`.

Facts from spec sections 4, 5, 13.1 and 13.3. Semantics are the reference's own, read row by row in float32. Its
entropy loader ignores most of the entropy model's arguments; we honour them, and fill in its forced window of 512
where the file names none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from blt.model.config import BLTConfig, EntropyConfig, HashConfig, TransformerConfig, swiglu_dim
from blt_runtime.errors import CheckpointError
from blt_runtime.patching import PatchRule, Scheme

PARAMS, WEIGHTS = "params.json", "consolidated.pth"
HASH_TABLES = "hash_embedding.tables.weight"

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


def is_reference(path: Path) -> bool:
    return (path / PARAMS).is_file()


def read_params(path: Path) -> dict[str, Any]:
    try:
        params = json.loads((path / PARAMS).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path / PARAMS}: {error}") from None
    if not isinstance(params, dict):
        raise CheckpointError(f"{path / PARAMS} is not a JSON object")
    return params


def read_weights(path: Path) -> dict[str, Tensor]:
    from blt.checkpoint import read_tensors  # the one place that opens pickled tensors

    content = read_tensors(path / WEIGHTS)
    weights = content.get("model", content)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path / WEIGHTS} holds no state dict under the key 'model'")
    return weights


def blt_config(params: Mapping[str, Any], weights: Mapping[str, Tensor]) -> BLTConfig:
    args = params.get("model")
    if not isinstance(args, dict):
        raise CheckpointError("params.json has no section 'model': this is no BLT (an entropy model, perhaps?)")
    _reject_unsupported(args)
    local_dim, rope = args["dim_local_encoder"], args.get("rope_theta") or 10000.0

    def stack(name: str, dim: int, layers: int, heads: int, **more: Any) -> TransformerConfig:
        q_rows, kv_rows = (_rows(weights, f"{name}.layers.0.attention.{part}.weight") for part in ("wq", "wk"))
        return TransformerConfig(
            dim=dim,
            n_layers=layers,
            n_heads=heads,
            n_kv_heads=max(1, kv_rows * heads // q_rows),
            head_dim=q_rows // heads,
            ffn_dim=swiglu_dim(dim, args.get("multiple_of", 256), args.get("ffn_dim_multiplier")),
            norm_eps=args.get("norm_eps", 1e-5),
            rope_theta=rope,
            **more,
        )

    window, length = args.get("local_attention_window_len"), args.get("max_encoder_seq_length") or 8192
    cross_heads = args.get("cross_attn_nheads")
    return BLTConfig(
        vocab_size=args.get("vocab_size", 260),
        encoder=stack(
            "local_encoder",
            local_dim,
            args["n_layers_local_encoder"],
            args["n_heads_local_encoder"],
            window=window,
            max_seqlen=length,
        ),
        latent=stack(
            "global_transformer",
            args["dim_global"],
            args["n_layers_global"],
            args["n_heads_global"],
            max_seqlen=args.get("max_seqlen") or 4096,
        ),
        decoder=stack(
            "local_decoder",
            args["dim_local_decoder"],
            args["n_layers_local_decoder"],
            args["n_heads_local_decoder"],
            window=window,
            max_seqlen=length,
        ),
        cross_k=args.get("cross_attn_k") or 1,
        encoder_cross_heads=cross_heads,
        decoder_cross_heads=cross_heads,
        encoder_cross_all_layers=bool(args.get("cross_attn_all_layers_encoder")),
        decoder_cross_all_layers=bool(args.get("cross_attn_all_layers_decoder")),
        encoder_cross_window=args.get("cross_attn_window_encoder") or 1,
        decoder_cross_window=args.get("cross_attn_window_decoder") or 1,
        decoder_projection="local_decoder.patch_embedding_projection.weight" in weights,
        pooling=args.get("downsampling_by_pooling") or "max",
        hash=_hash_config(args),
        latent_document_mask=args.get("attn_bias_type") == "block_causal",
    )


def _reject_unsupported(args: Mapping[str, Any]) -> None:
    wanted = {
        "use_rope": True,
        "cross_attn_encoder": True,
        "cross_attn_decoder": True,
        "cross_attn_init_by_pooling": True,
        "use_local_encoder_transformer": True,
        "weight_tying": False,
    }
    for key, value in wanted.items():
        if args.get(key, value) != value:
            raise CheckpointError(f"params.json: model.{key} = {args[key]} is not supported, only {value} is")


def _rows(weights: Mapping[str, Tensor], name: str) -> int:
    """Rows of a weight: the reference derives head counts from one of several arguments, the weight is what counts."""
    if name not in weights:
        raise CheckpointError(f"the checkpoint has no tensor {name}")
    return weights[name].shape[0]


def _hash_config(args: Mapping[str, Any]) -> HashConfig | None:
    sizes = args.get("encoder_hash_byte_group_size")
    if not sizes:
        return None
    return HashConfig(
        sizes=tuple(sizes),
        rows=args["encoder_hash_byte_group_vocab"],
        functions=args.get("encoder_hash_byte_group_nb_functions") or 1,
    )


def entropy_config(params: Mapping[str, Any], weights: Mapping[str, Tensor]) -> EntropyConfig:
    args = params.get("entropy_model") or params.get("model")
    if not isinstance(args, dict):
        raise CheckpointError("params.json has no section 'entropy_model'")
    heads = args["n_heads"]
    parts = ("attention.wq", "attention.wk", "feed_forward.w1")
    q_rows, kv_rows, hidden = (_rows(weights, f"layers.0.{part}.weight") for part in parts)
    return EntropyConfig(
        vocab_size=args.get("vocab_size", 260),
        dim=args["dim"],
        n_layers=args["n_layers"],
        n_heads=heads,
        n_kv_heads=max(1, kv_rows * heads // q_rows),
        head_dim=q_rows // heads,
        ffn_dim=hidden,
        norm_eps=args.get("norm_eps", 1e-5),
        rope_theta=args.get("rope_theta") or 10000.0,
        window=args.get("sliding_window") or 512,
        max_seqlen=max(8192, args.get("max_seqlen") or 0),
    )


def patch_rule(params: Mapping[str, Any]) -> PatchRule:
    args = (params.get("data") or {}).get("patcher_args") or {}
    scheme = args.get("patching_mode") or "entropy"
    if scheme == "entropy" and args.get("threshold") is None:
        raise CheckpointError("params.json: data.patcher_args has no threshold; entropy patching needs one")
    if scheme not in ("entropy", "space", "static", "byte", "bpe"):
        raise CheckpointError(f"params.json: patching_mode {scheme!r} is not supported")
    is_entropy = scheme == "entropy"
    monotonic = is_entropy and bool(args.get("monotonicity"))  # it wins over threshold_add
    return PatchRule(
        scheme=cast(Scheme, scheme),
        threshold=args["threshold"] if is_entropy else None,
        threshold_add=args.get("threshold_add") if is_entropy and not monotonic else None,
        monotonic=monotonic,
        patch_size=int(args["patch_size"]) if scheme == "static" else None,
        max_patch_length=args.get("max_patch_length"),
    )


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
