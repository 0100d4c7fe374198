"""`config.json` of a Hugging Face `BltForCausalLM` from our configurations, and what transformers cannot represent.

The numbers D1 to D11 are those of docs/spec.md, section 12; each was checked against transformers 5.23.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from blt.checkpoint.huggingface_config import our_configs, parse_config
from blt.checkpoint.source import Source
from blt.model.config import BLTConfig, EntropyConfig, HashConfig, TransformerConfig
from blt_runtime.patching import PatchRule


def obstacles(source: Source) -> list[str]:
    """Everything in a checkpoint that transformers cannot represent, with its D number if it has one."""
    if source.blt_config is None:
        return ["a checkpoint with only an entropy model" if source.bpe is None else "a token-level baseline"]
    found = _model_obstacles(source.blt_config) + _rule_obstacles(source.patch_rule)
    if source.patch_rule is not None and source.patch_rule.needs_entropy and source.entropy_config is None:
        found.append("no entropy model (name one with --entropy-model)")
    if source.entropy_config is not None:
        found += _entropy_obstacles(source.entropy_config)
    return found


def _entropy_obstacles(c: EntropyConfig) -> list[str]:
    checks = {
        "head_dim of the entropy model is not dim / n_heads": not _plain_heads(c),
        "hash n-grams of the entropy model": c.hash is not None,
        "an entropy model without layers": c.n_layers == 0,
    }
    return [name for name, holds in checks.items() if holds]


def _model_obstacles(c: BLTConfig) -> list[str]:
    stacks = {"encoder": c.encoder, "latent": c.latent, "decoder": c.decoder}
    checks = {
        f"encoder_cross_all_layers with {c.encoder.n_layers} encoder layers": c.encoder_cross_layers > 1,
        f"encoder_cross_window {c.encoder_cross_window}": c.encoder_cross_window > 1,
        f"decoder_cross_window {c.decoder_cross_window}": c.decoder_cross_window > 1,
        f"encoder_cross_heads {c.encoder_heads} with {c.encoder.n_heads} heads": (c.encoder_heads != c.encoder.n_heads),
        f"decoder_cross_heads {c.decoder_heads} with {c.decoder.n_heads} heads": (c.decoder_heads != c.decoder.n_heads),
        f"pooling {c.pooling!r}": c.pooling != "max",
        "decoder_projection off": not c.decoder_projection,
        f"windows of encoder ({c.encoder.window}) and decoder ({c.decoder.window}) differ": (
            c.encoder.window != c.decoder.window
        ),
        f"a window of {c.latent.window} in the latent transformer": c.latent.window is not None,
        **{f"head_dim of the {name} is not dim / n_heads": not _plain_heads(s) for name, s in stacks.items()},
    }
    return [name for name, holds in checks.items() if holds]


def _rule_obstacles(rule: PatchRule | None) -> list[str]:
    if rule is None:
        return ["no patch rule"]
    if rule.scheme not in ("entropy", "byte"):
        return [f"patch scheme {rule.scheme!r}"]
    checks = {
        f"max_patch_length {rule.max_patch_length}": rule.max_patch_length is not None,
        "monotonic patch rule": rule.monotonic,
        f"threshold_add {rule.threshold_add}": rule.threshold_add is not None,
        f"entropies compared in {rule.entropy_dtype}": rule.entropy_dtype != "float32",
        "reset_newlines": rule.reset_newlines,
    }
    return [name for name, holds in checks.items() if holds and rule.scheme == "entropy"]


EFFECTIVE = {
    "n_kv_heads": "kv_heads",
    "head_dim": "head_size",
    "ffn_dim": "hidden_dim",
    "encoder_cross_heads": "encoder_heads",
    "decoder_cross_heads": "decoder_heads",
    "encoder_cross_all_layers": "encoder_cross_layers",
    "decoder_cross_all_layers": "decoder_cross_layers",
}
"""Fields whose meaning a property computes: None is a default there, and all of one layer is the last one."""


def settings(config: BaseModel | PatchRule | None, prefix: str) -> dict[str, Any]:
    """Every field of a configuration or a rule with what it means, by its full name, such as `encoder.n_kv_heads`."""
    if config is None:
        return {}
    if isinstance(config, PatchRule):
        return {f"{prefix}.{name}": value for name, value in config.to_dict().items()}
    found: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, EFFECTIVE.get(name, name))
        nested = settings(value, f"{prefix}.{name}") if isinstance(value, BaseModel) else {f"{prefix}.{name}": value}
        found |= nested
    return found


def lost(source: Source, config: dict[str, Any]) -> list[str]:
    """The settings that differ when `config`, the content of config.json, is read again. Raises CheckpointError if it
    cannot be read."""
    where = str(source.path)
    blt, entropy, rule = our_configs(parse_config(config, where), where)
    written = settings(source.blt_config, "blt") | settings(source.entropy_config, "entropy")
    written |= settings(source.patch_rule, "patch_rule")
    back = settings(blt, "blt") | settings(entropy, "entropy") | settings(rule, "patch_rule")
    return [f"{name} {value} becomes {back.get(name)}" for name, value in written.items() if value != back.get(name)]


def _plain_heads(stack: TransformerConfig) -> bool:
    return stack.head_size == stack.dim // stack.n_heads


def to_json(blt: BLTConfig, entropy: EntropyConfig | None, rule: PatchRule, dtype: str) -> dict[str, Any]:
    """The content of config.json for a checkpoint without `obstacles`; `dtype` is torch's name, e.g. "bfloat16".

    use_cache is false because transformers' default generate() crashes with its own cache.
    """
    hashing = blt.hash or HashConfig(rows=1)
    local = {"vocab_size": blt.vocab_size, "cross_attn_k": blt.cross_k, "hidden_size_global": blt.latent.dim}
    encoder = {"cross_attn_all_layers": blt.encoder_cross_all_layers, "sliding_window": blt.encoder.window}
    config: dict[str, Any] = {
        "architectures": ["BltForCausalLM"],
        "model_type": "blt",
        "dtype": dtype,
        "vocab_size": blt.vocab_size,
        "max_position_embeddings": blt.latent.max_seqlen,
        "patch_in_forward": entropy is not None,
        "patch_size": 4,  # not read if there is a threshold, but null would turn entropy patching off
        "patching_mode": rule.scheme,
        "patching_threshold": rule.threshold,
        "patching_batch_size": 1,
        "max_patch_length": None,
        "local_attention_window_len": blt.encoder.window,
        "cross_attn_k": blt.cross_k,
        "encoder_hash_byte_group_size": list(hashing.sizes),
        "encoder_hash_byte_group_vocab": hashing.rows,
        "encoder_hash_byte_group_nb_functions": hashing.functions if blt.hash else 0,
        "tie_word_embeddings": False,
        "use_cache": False,
        "encoder_config": _stack_json(blt.encoder, "blt_local_encoder", local=True) | local | encoder,
        "decoder_config": _stack_json(blt.decoder, "blt_local_decoder", local=True)
        | local
        | {"cross_attn_all_layers": blt.decoder_cross_all_layers},
        "global_config": _stack_json(blt.latent, "blt_global_transformer"),
    }
    if entropy is not None:
        patcher = {"vocab_size": entropy.vocab_size, "sliding_window": entropy.window}
        config["patcher_config"] = _stack_json(entropy, "blt_patcher") | patcher
    return config


def _stack_json(stack: TransformerConfig, model_type: str, local: bool = False) -> dict[str, Any]:
    """Local stacks get as many key/value heads as heads, because transformers groups their cross-attention, too."""
    return {
        "model_type": model_type,
        "hidden_size": stack.dim,
        "num_hidden_layers": stack.n_layers,
        "num_attention_heads": stack.n_heads,
        "num_key_value_heads": stack.n_heads if local else stack.kv_heads,
        "intermediate_size": stack.hidden_dim,
        "max_position_embeddings": stack.max_seqlen,
        "rms_norm_eps": stack.norm_eps,
        "hidden_act": "silu",
        "dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": stack.rope_theta},
        "tie_word_embeddings": False,
    }
