"""The facebook format: checkpoints of facebookresearch/blt, in two layouts that share names and arguments.

Training folder: `params.json` and `consolidated.pth`. Hub folder: `config.json` with `args`, `model.safetensors`, and
for a BLT `train_args.json`, which has the content of params.json. Both store the entropy model in a separate folder.

The facts are in spec sections 4, 5 and 13.1 to 13.3. A checkpoint means what facebookresearch/blt computes row by row
in float32, with two deliberate differences. Its entropy model starts without context every 8,192 tokens; ours never
does. Its `attn_impl` chooses the kernels, and every choice but xformers loses the masks; we always mask.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from torch import Tensor

from blt.checkpoint.source import HASH_TABLES, Source, StoredModel, fit_weights, parse, read_json
from blt.checkpoint.tensors import StoredTensor, inside, read_safetensors, read_tensors, stored_tensors
from blt.model.config import BLTConfig, EntropyConfig, HashConfig, TransformerConfig
from blt_runtime.errors import BltError, CheckpointError, ConfigError
from blt_runtime.patching import PatchRule

log = logging.getLogger(__name__)
PARAMS, WEIGHTS = "params.json", "consolidated.pth"
HUB_CONFIG, HUB_WEIGHTS, TRAIN_ARGS = "config.json", "model.safetensors", "train_args.json"
Tensors = Mapping[str, StoredTensor]

# our names -> theirs; the first pattern that matches is applied
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
"""Tensors that facebookresearch/blt stores and never reads (spec sections 11 and 13.3)."""


def facebook_name(name: str, entropy: bool = False) -> str:
    """The facebook name of one of our parameters. Hash tables are stored one by one, see `hash_table_name`."""
    for pattern, replacement in ENTROPY_RENAMES if entropy else RENAMES:
        renamed, n = re.subn("^" + pattern, replacement, name)
        if n:
            return renamed
    return name


def hash_table_name(table: int) -> str:
    return f"encoder_hash_tok_embedding.{table}.weight"


class Arguments(BaseModel):
    """The arguments that decide what the weights compute. Others, for training, are ignored."""

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
    # only these values are supported
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


def matches(path: Path) -> bool:
    """A training folder has params.json, a hub folder has `args` in its config.json."""
    return path.is_dir() and ((path / PARAMS).is_file() or "args" in _json(path / HUB_CONFIG, required=False))


def read(path: Path) -> Source:
    """A BLT and its patch rule, or an entropy model. Raises CheckpointError."""
    try:
        source = _read_training(path) if (path / PARAMS).is_file() else _read_hub(path)
    except CheckpointError:
        raise
    except ValidationError as error:  # from the checks of the configurations
        raise CheckpointError(f"{path}: {error.errors()[0]['msg']}") from None
    except BltError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return source.check_vocabularies()


def _read_training(path: Path) -> Source:
    file = path / PARAMS
    params, tensors = _json(file), _read_pickled(path / WEIGHTS)
    if params.get("train_entropy_model") or not params.get("model"):
        key = "entropy_model" if params.get("entropy_model") else "model"
        entropy = _section(EntropyArguments, file, params, key)
        _check_forced(entropy, file)
        return Source("facebook", path, entropy=_entropy_model(entropy, tensors, path))
    args = _section(ModelArguments, file, params, "model")
    rule = patch_rule(args, params, file)
    return Source("facebook", path, blt=_blt(args, tensors, path), patch_rule=rule)


def _read_hub(path: Path) -> Source:
    file, train_args = path / HUB_CONFIG, path / TRAIN_ARGS
    config, tensors = _json(file), read_safetensors(path / HUB_WEIGHTS)
    if not isinstance(config["args"], dict) or "dim_global" not in config["args"]:
        entropy = _section(EntropyArguments, file, config, "args")
        return Source("facebook-hub", path, entropy=_entropy_model(entropy, tensors, path))
    if not train_args.is_file():
        raise CheckpointError(f"{path} has no {TRAIN_ARGS}, the only file with the patch threshold; copy it, too")
    args = _section(ModelArguments, file, config, "args")
    rule = patch_rule(args, _json(train_args), train_args)
    return Source("facebook-hub", path, blt=_blt(args, tensors, path), patch_rule=rule)


def _blt(args: ModelArguments, tensors: Tensors, path: Path) -> StoredModel[BLTConfig]:
    config = blt_config(args, tensors)
    n_tables = config.hash.n_tables if config.hash else 0

    def names_of(ours: str) -> list[str]:
        return [hash_table_name(t) for t in range(n_tables)] if ours == HASH_TABLES else [facebook_name(ours)]

    return fit_weights(config, tensors, names_of, where=path, unused=UNUSED)


def _entropy_model(args: EntropyArguments, tensors: Tensors, path: Path) -> StoredModel[EntropyConfig]:
    return fit_weights(
        entropy_config(args, tensors), tensors, lambda n: [facebook_name(n, entropy=True)], where=path, unused=UNUSED
    )


def _check_forced(args: EntropyArguments, file: Path) -> None:
    """Raises CheckpointError for an entropy model that facebookresearch/blt does not run as it was trained.

    Its loader ignores these arguments and uses fixed values (spec section 4), so a model that was trained with others
    gives wrong entropies there.
    """
    for name, forced in (("sliding_window", 512), ("rope_theta", 10000.0), ("norm_eps", 1e-5)):
        value = getattr(args, name)
        if value is not None and value != forced:
            raise CheckpointError(
                f"{file}: the entropy model has {name} {value}, but facebookresearch/blt runs every one with {forced}: "
                f"it does not belong to the BLT's patches; write {forced} to get what facebookresearch/blt computes"
            )


def _json(path: Path, required: bool = True) -> dict[str, Any]:
    if not required and not path.is_file():
        return {}
    values = read_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return values


def _read_pickled(path: Path) -> Tensors:
    content = read_tensors(inside(path.parent, path.name))
    weights = content.get("model", content)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path} holds no state dict under the key 'model'")
    return stored_tensors(weights, path)


def _section(kind: type[Section], file: Path, values: Any, *keys: str) -> Section:
    """One section of a JSON file, validated. Raises CheckpointError that names the argument."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    where = ".".join(keys)
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} has no section {where!r}")
    return parse(kind, values, str(file), where)


def blt_config(args: ModelArguments, weights: Tensors) -> BLTConfig:
    if args.attn_impl not in (None, "xformers"):
        log.warning("attn_impl is %s; windows and documents are masked anyway, as with xformers", args.attn_impl)

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
            **_shapes(weights, f"{name}.layers.", heads),
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
        encoder_cross_heads=None if args.cross_attn_nheads == encoder[2] else args.cross_attn_nheads,
        decoder_cross_heads=None if args.cross_attn_nheads == decoder[2] else args.cross_attn_nheads,
        encoder_cross_all_layers=bool(args.cross_attn_all_layers_encoder),
        decoder_cross_all_layers=bool(args.cross_attn_all_layers_decoder),
        encoder_cross_window=args.cross_attn_window_encoder or 1,
        decoder_cross_window=args.cross_attn_window_decoder or 1,
        decoder_projection="local_decoder.patch_embedding_projection.weight" in weights,
        pooling=args.downsampling_by_pooling or "max",
        hash=_hash_config(args),
        latent_document_mask=args.attn_bias_type == "block_causal",
    )


def _shapes(weights: Tensors, stack: str, heads: int) -> dict[str, Any]:
    """Head counts and widths from a stack's weights.

    facebookresearch/blt derives each of them from one of several arguments, and only the weights are decisive. A value
    that the weights do not give is None; the weights are then missing and reported as such.
    """
    width = _most_common(weights, stack, ("attention.wq", 0), ("attention.wo", 1))
    shared = _most_common(weights, stack, ("attention.wk", 0), ("attention.wv", 0))
    ffn_dim = _most_common(weights, stack, ("feed_forward.w1", 0), ("feed_forward.w3", 0), ("feed_forward.w2", 1))
    if width is None or shared is None:
        return {"n_heads": heads, "ffn_dim": ffn_dim}
    head_dim = width // heads
    if head_dim == 0 or width % heads or shared % head_dim:
        raise ConfigError(
            f"{stack}*.attention.wq and wk with {width} and {shared} rows do not divide into {heads} heads"
        )
    default = _most_common(weights, stack, ("attention.wq", 1), ("attention.wo", 0)) == width
    return {
        "n_heads": heads,
        "n_kv_heads": shared // head_dim,
        "head_dim": None if default else head_dim,
        "ffn_dim": ffn_dim,
    }


def _most_common(weights: Tensors, stack: str, *places: tuple[str, int]) -> int | None:
    """The most frequent size of a stack's matrices at these places (name and axis), so that one matrix of a wrong shape
    does not define what is expected of the others."""
    named = [(name.removeprefix(stack), tensor.shape) for name, tensor in weights.items() if name.startswith(stack)]
    sizes = [
        shape[axis]
        for name, shape in named
        for part, axis in places
        if name.endswith(f".{part}.weight") and len(shape) == 2
    ]
    return max(sizes, key=sizes.count) if sizes else None


def _hash_config(args: ModelArguments) -> HashConfig | None:
    if not args.encoder_hash_byte_group_size:
        return None
    return HashConfig(
        sizes=tuple(args.encoder_hash_byte_group_size),
        rows=args.encoder_hash_byte_group_vocab,
        functions=args.encoder_hash_byte_group_nb_functions or 1,
    )


def entropy_config(args: EntropyArguments, weights: Tensors) -> EntropyConfig:
    return EntropyConfig(
        vocab_size=args.vocab_size,
        dim=args.dim,
        n_layers=args.n_layers,
        norm_eps=args.norm_eps,
        rope_theta=args.rope_theta or 10000.0,
        window=args.sliding_window or 512,
        max_seqlen=max(8192, args.max_seqlen or 0),
        **_shapes(weights, "layers.", args.n_heads),
    )


def patch_rule(model: ModelArguments, params: Mapping[str, Any], file: Path) -> PatchRule:
    """The rule of `data.patcher_args`, or the model's own with `patch_in_forward` (spec section 5)."""
    if model.patch_in_forward:
        if model.patching_mode not in ("space", "byte"):
            raise CheckpointError(f"{file}: model.patch_in_forward works for space and byte patching only")
        return PatchRule.from_dict({"scheme": model.patching_mode, "max_patch_length": model.max_patch_length})
    args = _section(PatcherArguments, file, params, "data", "patcher_args")
    rule: dict[str, Any] = {"scheme": args.patching_mode, "max_patch_length": args.max_patch_length}
    if args.patching_mode == "entropy":
        if args.threshold is None:
            raise CheckpointError(f"{file}: data.patcher_args has no threshold; entropy patching needs one")
        # monotonicity takes precedence over threshold_add
        add = None if args.monotonicity else args.threshold_add
        rule |= {"threshold": args.threshold, "threshold_add": add, "monotonic": args.monotonicity}
    if args.patching_mode == "static":
        if args.patch_size is None or args.patch_size != int(args.patch_size):
            raise CheckpointError(f"{file}: static patching needs a whole patch_size, not {args.patch_size}")
        rule["patch_size"] = int(args.patch_size)
    return PatchRule.from_dict(rule)
