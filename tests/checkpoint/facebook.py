"""Checkpoints of ours written in the training and hub formats of facebookresearch/blt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from blt.checkpoint.facebook import facebook_name, hash_table_name
from blt.checkpoint.models import Checkpoint
from blt.checkpoint.source import HASH_TABLES
from blt.model import EntropyModel
from tests.tiny import ENTROPY

Form = Literal["training", "hub"]


def facebook_state(state: Mapping[str, Tensor], n_tables: int, entropy: bool = False) -> dict[str, Tensor]:
    """The same tensors (or their gradients) under their facebook names."""
    named = {facebook_name(name, entropy): tensor for name, tensor in state.items() if name != HASH_TABLES}
    if n_tables:
        chunks = state[HASH_TABLES].chunk(n_tables)
        named |= {hash_table_name(table): chunk for table, chunk in enumerate(chunks)}
    return named


def write_facebook(folder: Path, checkpoint: Checkpoint, form: Form = "training") -> Path:
    """Writes the checkpoint as folders `blt` and `entropy_model` and returns the former. The training format allows one
    window of the entropy model (spec section 4)."""
    blt, rule = checkpoint.require_blt()
    c, h = blt.config, blt.config.hash
    model: dict[str, Any] = {
        "dim_local_encoder": c.local_dim,
        "dim_local_decoder": c.local_dim,
        "dim_global": c.latent.dim,
        "n_layers_local_encoder": c.encoder.n_layers,
        "n_layers_local_decoder": c.decoder.n_layers,
        "n_layers_global": c.latent.n_layers,
        "n_heads_local_encoder": c.encoder.n_heads,
        "n_heads_local_decoder": c.decoder.n_heads,
        "n_heads_global": c.latent.n_heads,
        "vocab_size": c.vocab_size,
        "norm_eps": c.encoder.norm_eps,
        "rope_theta": c.encoder.rope_theta,
        "max_encoder_seq_length": c.encoder.max_seqlen,
        "max_seqlen": c.latent.max_seqlen,
        "local_attention_window_len": c.encoder.window,
        "cross_attn_k": c.cross_k,
        "cross_attn_nheads": c.encoder_heads,
        "cross_attn_all_layers_encoder": c.encoder_cross_all_layers,
        "cross_attn_all_layers_decoder": c.decoder_cross_all_layers,
        "cross_attn_window_encoder": c.encoder_cross_window,
        "cross_attn_window_decoder": c.decoder_cross_window,
        "downsampling_by_pooling": c.pooling,
        "encoder_hash_byte_group_size": list(h.sizes) if h else [],
        "encoder_hash_byte_group_vocab": h.rows if h else 1,
        "encoder_hash_byte_group_nb_functions": h.functions if h else None,
        "attn_bias_type": "block_causal" if c.latent_document_mask else "causal",
        "something_for_training": {"ignored": True},
    }
    patcher = {
        "patching_mode": rule.scheme,
        "threshold": rule.threshold if rule.threshold is not None else 1.3,
        "threshold_add": rule.threshold_add,
        "monotonicity": rule.monotonic,
        "max_patch_length": rule.max_patch_length,
        "patch_size": rule.patch_size or 4.5,
    }
    state = facebook_state(blt.state_dict(), h.n_tables if h else 0)
    _write(folder / "blt", {"model": model, "data": {"patcher_args": patcher}}, "model", state, form)
    if checkpoint.entropy is not None:
        e = checkpoint.entropy.config
        args = {
            "dim": e.dim,
            "n_layers": e.n_layers,
            "n_heads": e.n_heads,
            "vocab_size": e.vocab_size,
            "norm_eps": e.norm_eps,
            "rope_theta": e.rope_theta,
            "sliding_window": e.window if form == "hub" else 512,
            "max_seqlen": 640,
        }
        params = {"train_entropy_model": True, "entropy_model": args, "model": None}
        state = facebook_state(checkpoint.entropy.state_dict(), 0, entropy=True)
        _write(folder / "entropy_model", params, "entropy_model", state, form)
    return folder / "blt"


def _write(folder: Path, params: dict[str, Any], key: str, state: dict[str, torch.Tensor], form: Form) -> None:
    folder.mkdir()
    if form == "training":
        (folder / "params.json").write_text(json.dumps(params))
        torch.save({"model": state}, folder / "consolidated.pth")
        return
    (folder / "config.json").write_text(json.dumps({"args": params[key]}))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    if key == "model":
        (folder / "train_args.json").write_text(json.dumps(params))


def forced_window(checkpoint: Checkpoint) -> Checkpoint:
    """The same weights with the one window of the entropy model that the training format allows."""
    if checkpoint.entropy is None:
        return checkpoint
    entropy = EntropyModel(ENTROPY.model_copy(update={"window": 512}))
    entropy.load_state_dict(checkpoint.entropy.state_dict())
    return replace(checkpoint, entropy=entropy.eval())
