"""Our own checkpoint, `model.pt`: one file with the BLT, its entropy model, their configurations and the patch rule.

{"format": "blt-model", "version": 1,
 "config": {"blt": {...} | None, "entropy": {...} | None, "patch_rule": {...} | None},
 "blt": state dict | None, "entropy": state dict | None}

An entropy model with hash n-grams or without layers needs version 2, everything else is written as version 1.

The checkpoint of a token-level baseline also has the configuration and weights "bpe", and the text of its tokenizer
under "config" ("tokenizer").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch

from blt.checkpoint.source import Source, StoredModel, fit_weights, parse
from blt.checkpoint.tensors import inside, read_tensors, stored_tensors, write_pickled
from blt.model import BLTConfig, EntropyConfig
from blt.model.token import TokenConfig
from blt_runtime.errors import BltError, CheckpointError, shown
from blt_runtime.patching import PatchRule

FORMAT, VERSIONS = "blt-model", (1, 2)
MODEL_FILE = "model.pt"
ModelConfig = TypeVar("ModelConfig", bound=BLTConfig | EntropyConfig)


def matches(path: Path) -> bool:
    """Any file, or a folder that holds a model.pt (a finished run)."""
    return path.is_file() or (path / MODEL_FILE).is_file()


def read(path: Path) -> Source:
    """Raises CheckpointError."""
    path = inside(path, MODEL_FILE) if path.is_dir() else path
    content = read_tensors(path)
    kind, version = content.get("format"), content.get("version")
    if not isinstance(kind, str) or kind != FORMAT:
        raise CheckpointError(
            f"{path} is not a {FORMAT} file; for weights of another format give the folder that holds them"
        )
    if type(version) is not int or version not in VERSIONS:  # a tensor is equal to no number
        raise CheckpointError(
            f"{path} has format version {shown(version)}, this release reads versions up to {VERSIONS[-1]}: "
            "upgrade blt-lm"
        )
    config = content.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} has no configuration")
    rule = None if config.get("patch_rule") is None else _rule(config["patch_rule"], path)
    tokenizer = config.get("tokenizer")
    bpe = _model(TokenConfig, "bpe", content, path)
    if bpe is not None and not isinstance(tokenizer, str):
        raise CheckpointError(f"{path} has a token model and no tokenizer; copy it again")
    return Source(
        format="native",
        path=path,
        blt=_model(BLTConfig, "blt", content, path),
        entropy=_model(EntropyConfig, "entropy", content, path),
        patch_rule=rule,
        bpe=bpe,
        tokenizer=tokenizer,
    ).check_vocabularies()


def write(source: Source, path: Path, dtype: torch.dtype | None = None) -> None:
    """Writes one file, streamed and atomically. `dtype` is that of the stored weights (default: unchanged)."""
    models = source.models()
    config = {name: model.config.model_dump(mode="json") for name, model in models.items()}
    rule = source.patch_rule.to_dict() if source.patch_rule else None
    tokens = {"tokenizer": source.tokenizer} if source.tokenizer is not None else {}
    content = {
        "format": FORMAT,
        "version": VERSIONS[_is_new(source.entropy_config)],
        "config": {"blt": None, "entropy": None, **config, "patch_rule": rule, **tokens},
        "blt": None,
        "entropy": None,
    }
    write_pickled(path, content, {name: model.weights for name, model in models.items()}, dtype)


def _is_new(config: EntropyConfig | None) -> bool:
    return config is not None and (config.hash is not None or config.n_layers == 0)


def _model(kind: type[ModelConfig], key: str, content: dict[str, Any], path: Path) -> StoredModel[ModelConfig] | None:
    values = content["config"].get(key)
    if values is None:
        return None
    config = parse(kind, values, str(path), key)
    weights = content.get(key)
    found = stored_tensors(weights if isinstance(weights, dict) else {}, path)
    return fit_weights(config, found, lambda name: [name], where=path)


def _rule(values: Any, path: Path) -> PatchRule:
    try:
        return PatchRule.from_dict(values)
    except BltError as error:
        raise CheckpointError(f"{path}: {error}") from None
