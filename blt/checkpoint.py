"""Checkpoints: one file with the BLT, its entropy model, their configurations and the patch rule.

    {"format": "blt-model", "version": 1,
     "config": {"blt": {...} | None, "entropy": {...} | None, "patch_rule": {...} | None},
     "blt": state dict | None, "entropy": state dict | None}

Nothing in it is code: it is read with `weights_only=True`, and so is every foreign checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from blt.adapters import reference
from blt.model import BLT, BLTConfig, EntropyConfig, EntropyModel
from blt.tensors import atomic_save, fill, read_tensors
from blt_runtime.errors import BltError, CheckpointError
from blt_runtime.patching import PatchRule

FORMAT, VERSION = "blt-model", 1
MODEL_FILE = "model.pt"
Config = TypeVar("Config", bound=BaseModel)


@dataclass(frozen=True)
class Checkpoint:
    """What a model file holds. An entropy model alone has no `blt`; a rule without entropies needs no `entropy`."""

    blt: BLT | None
    entropy: EntropyModel | None
    patch_rule: PatchRule | None

    def require_blt(self) -> tuple[BLT, PatchRule]:
        """The BLT and its rule, or CheckpointError if this is an entropy model alone."""
        if self.blt is None:
            raise CheckpointError("this checkpoint holds an entropy model only; give one made by `blt train blt`")
        if self.patch_rule is None:
            raise CheckpointError("this checkpoint has no patch rule, so nobody knows where its patches begin")
        if self.patch_rule.needs_entropy and self.entropy is None:
            raise CheckpointError("the patch rule needs an entropy model; name one with --entropy-model PATH")
        return self.blt, self.patch_rule


def load(path: str | Path, entropy_model: str | Path | None = None) -> Checkpoint:
    """Load any supported checkpoint in float32, in evaluation mode.

    path: a `model.pt`, a folder that contains one, or a folder in the reference's training format, whose entropy
    model is `entropy_model` or a folder of that name beside it.  Raises CheckpointError.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_dir() and reference.is_reference(path):
        checkpoint = Checkpoint(*reference.load(path))
        beside = path.absolute().parent / "entropy_model"
        if entropy_model is None and checkpoint.blt is not None and beside.is_dir():
            entropy_model = beside
    else:
        checkpoint = _load_native(path / MODEL_FILE if path.is_dir() else path)
    if entropy_model is None:
        return checkpoint
    given = load(entropy_model).entropy
    if given is None:
        raise CheckpointError(f"{entropy_model} holds no entropy model")
    return replace(checkpoint, entropy=given)


def save(path: str | Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """Write `model.pt` atomically; `dtype` is that of the stored floating-point weights (default: as they are)."""
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION, "config": {}}
    parts: tuple[tuple[str, BLT | EntropyModel | None], ...] = (
        ("blt", checkpoint.blt),
        ("entropy", checkpoint.entropy),
    )
    for key, model in parts:
        content["config"][key] = model.config.model_dump(mode="json") if model else None
        content[key] = (
            {name: t.detach().cpu().to(dtype or t.dtype) for name, t in model.state_dict().items()} if model else None
        )
    content["config"]["patch_rule"] = checkpoint.patch_rule.to_dict() if checkpoint.patch_rule else None
    atomic_save(Path(path), content)


def _load_native(path: Path) -> Checkpoint:
    content = read_tensors(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a {FORMAT} file (train one, or give a folder with params.json)")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {content.get('version')!r}, known is {VERSION}: upgrade blt-lm"
        )
    config = content.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} has no configuration")
    blt = entropy = rule = None
    if config.get("blt") is not None:
        blt = fill(BLT(_parse(BLTConfig, config["blt"], path)), content.get("blt"), path)
    if config.get("entropy") is not None:
        entropy = fill(EntropyModel(_parse(EntropyConfig, config["entropy"], path)), content.get("entropy"), path)
    if config.get("patch_rule") is not None:
        try:
            rule = PatchRule.from_dict(config["patch_rule"])
        except BltError as error:
            raise CheckpointError(f"{path}: {error}") from None
    return Checkpoint(blt, entropy, rule)


def _parse(kind: type[Config], values: Any, path: Path) -> Config:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: configuration {where}: {first['msg']}") from None
