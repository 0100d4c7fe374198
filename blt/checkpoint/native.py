"""Our own checkpoint, `model.pt`: one file with the BLT, its entropy model, their configurations and the patch rule.

{"format": "blt-model", "version": 1,
 "config": {"blt": {...} | None, "entropy": {...} | None, "patch_rule": {...} | None},
 "blt": state dict | None, "entropy": state dict | None}

A token-level baseline has a configuration and weights "bpe" besides, and its tokenizer as text ("tokenizer").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from blt.checkpoint.source import Part, Source, make_part, parse
from blt.checkpoint.tensors import read_tensors, stored, write_pickled
from blt.model import BLTConfig, EntropyConfig
from blt.model.token import TokenConfig
from blt_runtime.errors import BltError, CheckpointError
from blt_runtime.patching import PatchRule

FORMAT, VERSION = "blt-model", 1
MODEL_FILE = "model.pt"


def matches(path: Path) -> bool:
    """A file, or a folder (of a finished run) with one in it."""
    return path.is_file() or (path / MODEL_FILE).is_file()


def read(path: Path) -> Source:
    """Raises CheckpointError."""
    path = path / MODEL_FILE if path.is_dir() else path
    content = read_tensors(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a {FORMAT} file; weights of another format are read by their folder's name"
        )
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {content.get('version')!r}, known is {VERSION}: upgrade blt-lm"
        )
    config = content.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} has no configuration")
    rule = None if config.get("patch_rule") is None else _rule(config["patch_rule"], path)
    blt = _part(BLTConfig, "blt", content, path)
    entropy, bpe = _part(EntropyConfig, "entropy", content, path), _part(TokenConfig, "bpe", content, path)
    tokenizer = config.get("tokenizer")
    if bpe is not None and not isinstance(tokenizer, str):
        raise CheckpointError(f"{path} has a token model and no tokenizer; copy it again")
    return Source("native", path, blt, entropy, rule, bpe, tokenizer).check_together()


def write(source: Source, path: Path, dtype: torch.dtype | None = None) -> None:
    """One file, streamed and atomic; `dtype` is that of the stored weights (default: as they are)."""
    parts = source.parts()
    config = {name: part.config.model_dump(mode="json") for name, part in parts.items()}
    rule = source.patch_rule.to_dict() if source.patch_rule else None
    tokens = {"tokenizer": source.tokenizer} if source.tokenizer is not None else {}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "config": {"blt": None, "entropy": None, **config, "patch_rule": rule, **tokens},
        "blt": None,
        "entropy": None,
    }
    write_pickled(path, content, {name: part.weights for name, part in parts.items()}, dtype)


def _part(kind: type[BLTConfig | EntropyConfig], key: str, content: dict[str, Any], path: Path) -> Part | None:
    values = content["config"].get(key)
    if values is None:
        return None
    config = parse(kind, values, str(path), key)
    weights = content.get(key)
    found = stored(weights if isinstance(weights, dict) else {}, path)
    return make_part(config, found, lambda name: [name], path)


def _rule(values: Any, path: Path) -> PatchRule:
    try:
        return PatchRule.from_dict(values)
    except BltError as error:
        raise CheckpointError(f"{path}: {error}") from None
