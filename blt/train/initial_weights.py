"""Initial weights of a run: random ones, a checkpoint of any format, or a Llama for the latent transformer.

`complete` adds to a configuration the sections that it leaves to the checkpoint, before it is validated. `draw` and
`initialise` fill the rows of each weight that this rank holds, from a generator or from the files.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blt.checkpoint import llama, models
from blt.checkpoint.formats import open_source
from blt.checkpoint.source import Source, StoredModel
from blt.model import BLT, BLTConfig, EntropyConfig, EntropyModel, TransformerConfig, init
from blt.model.shards import local_rows
from blt_runtime.errors import CheckpointError, ConfigError
from blt_runtime.patching import PatchSettings

log = logging.getLogger("blt.train")
Values = dict[str, Any]
FREE = (
    "max_seqlen", "window", "norm_eps", "rope_theta", "encoder_cross_window", "decoder_cross_window",
    "latent_document_mask",
)  # fmt: skip
"""Keys that no weight of a checkpoint depends on, so that a run may change them."""


def complete(raw: Mapping[str, Any]) -> Values:
    """The sections of a run, completed from `init`: from a checkpoint the model, the patch rule and the entropy model,
    from a Llama `model.latent`. A run without `init` is returned unchanged. Raises CheckpointError."""
    init, filled = raw.get("init"), dict(raw)
    if not isinstance(init, Mapping):
        return filled
    if isinstance(init.get("checkpoint"), str):
        _from_checkpoint(filled, init["checkpoint"])
    if raw.get("kind") == "blt" and isinstance(init.get("latent"), str) and isinstance(filled.get("model"), Mapping):
        known = llama.read(init["latent"]).config.model_dump(mode="json", exclude_none=True)
        filled["model"] = _merged({"latent": known}, filled["model"])
    return filled


def _from_checkpoint(raw: Values, path: str) -> None:
    source = open_source(path, raw.get("entropy_model"))
    stored = _stored(source, raw.get("kind") == "entropy")
    raw["model"] = _merged(stored.config.model_dump(mode="json"), raw.get("model", {}))
    if raw.get("kind") != "blt":
        return
    if source.patch_rule is not None:
        rule = {field.name: getattr(source.patch_rule, field.name) for field in dataclasses.fields(PatchSettings)}
        raw["patching"] = _patching(rule, raw.get("patching", {}))
    scheme = raw["patching"].get("scheme") if isinstance(raw.get("patching"), Mapping) else None
    if source.entropy is not None and scheme == "entropy" and raw.get("entropy_model") is None:
        raw["entropy_model"] = path


def _patching(rule: Values, given: Any) -> Any:
    """The checkpoint's rule, overridden by the section `given`.

    Another scheme replaces the whole rule. A target patch size drops the checkpoint's threshold, so that one is chosen.
    """
    if not isinstance(given, Mapping) or given.get("scheme", rule["scheme"]) != rule["scheme"]:
        return given
    chosen = {"threshold": None} if "target_patch_size" in given else {}
    return {**rule, **chosen, **given}


def _merged(base: Any, over: Any) -> Any:
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    return {**base, **{key: _merged(base[key], value) if key in base else value for key, value in over.items()}}


def _stored(source: Source, entropy: bool) -> StoredModel[BLTConfig] | StoredModel[EntropyConfig]:
    stored = source.entropy if entropy else source.blt
    if stored is None:
        what = "entropy model" if entropy else "BLT"
        raise CheckpointError(f"{source.path} holds no {what} to start from; give another init.checkpoint")
    return stored


# --- weights -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(model: nn.Module, seed: int) -> None:
    """Random weights by `blt.model.init`: the same for any number of ranks."""
    for name, weight, fan_in in init.weights(model):
        rows, first = local_rows(weight)
        if fan_in is None:
            rows.fill_(1.0)
        else:
            init.draw_rows(rows, fan_in, seed=seed, name=name, first=first)


@torch.no_grad()
def initialise(model: BLT | EntropyModel, checkpoint_path: str | None = None, latent_path: str | None = None) -> None:
    """Replaces the random weights of `model` by those of a checkpoint, or its latent blocks by a Llama's.

    A rank reads the rows that it holds. Raises CheckpointError if the checkpoint has another shape, other hash
    functions, or weights that are not finite among them. Options that no weight depends on may differ; a warning lists
    them.
    """
    if checkpoint_path is not None:
        source = open_source(checkpoint_path)
        stored = _stored(source, isinstance(model, EntropyModel))
        _check_same(stored.config, model.config, source.path)
        not_finite = []
        for name, parameter in model.named_parameters():
            rows, first = local_rows(parameter)
            weight = stored.weights[name].rows(first, first + len(rows))
            not_finite += weight.not_finite()
            weight.copy_to(rows)
        source.refuse(not_finite)
        log.info("initial weights from %s", source.path)
    if latent_path is not None:
        if not isinstance(model, BLT):
            raise ConfigError("init.latent is for BLT runs; an entropy model has no latent transformer")
        found = llama.read(latent_path)
        found.copy_to(model.latent)
        log.info("initialised %d blocks of the latent transformer from %s", found.config.n_layers, found.path)


def entropy_model(path: str | Path) -> EntropyModel | None:
    """The entropy model of a checkpoint in float32, or None; nothing else is loaded. Raises as `open_source`."""
    source = open_source(path)
    entropy_only = Source(source.format, source.path, entropy=source.entropy)
    return models.build(entropy_only, trainable=True).entropy


def _check_same(theirs: BLTConfig | EntropyConfig, ours: BLTConfig | EntropyConfig, path: Path) -> None:
    old, new = dict(_settings(theirs)), dict(_settings(ours))
    changed = [key for key in old | new if old.get(key) != new.get(key)]
    wrong = [key for key in changed if key.split(".")[-1] not in FREE]
    if wrong:
        listed = ", ".join(f"{key} {old.get(key)} (not {new.get(key)})" for key in wrong)
        raise CheckpointError(f"{path} does not fit the section model: it has {listed}; leave these keys out")
    reported = [key for key in changed if not key.endswith("max_seqlen")]
    if reported:
        listed = ", ".join(f"{key} {old.get(key)}, now {new.get(key)}" for key in reported)
        log.warning("the checkpoint was trained with %s", listed)


def _settings(config: BLTConfig | EntropyConfig) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all settings; sizes that follow from others are computed."""
    if isinstance(config, TransformerConfig):
        yield from _stack_settings("", config)
        return
    for key, value in config.model_dump().items():
        if isinstance(getattr(config, key), TransformerConfig):
            yield from _stack_settings(f"{key}.", getattr(config, key))
        elif key not in ("encoder_cross_heads", "decoder_cross_heads"):
            yield key, value
    yield "encoder_cross_heads", config.encoder_heads
    yield "decoder_cross_heads", config.decoder_heads


def _stack_settings(prefix: str, config: TransformerConfig) -> Iterator[tuple[str, Any]]:
    computed = {"n_kv_heads": config.kv_heads, "head_dim": config.head_size, "ffn_dim": config.hidden_dim}
    for key, value in (config.model_dump() | computed).items():
        yield prefix + key, value
