"""Checkpoints: one file with the BLT, its entropy model, their configurations and the patch rule.

    {"format": "blt-model", "version": 1,
     "config": {"blt": {...} | None, "entropy": {...} | None, "patch_rule": {...} | None},
     "blt": state dict | None, "entropy": state dict | None}

Nothing in it is code: it is read with `weights_only=True`, and so is every foreign checkpoint.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from blt.adapters import reference
from blt.model import BLT, BLTConfig, EntropyConfig, EntropyModel
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
        if self.blt is None or self.patch_rule is None:
            raise CheckpointError("this checkpoint holds an entropy model only; give one made by `blt train blt`")
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
        return _load_reference(path, Path(entropy_model) if entropy_model else path.parent / "entropy_model")
    checkpoint = _load_native(path / MODEL_FILE if path.is_dir() else path)
    if entropy_model is not None:
        checkpoint = replace(checkpoint, entropy=load(entropy_model).entropy)
    return checkpoint


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


def atomic_save(path: Path, content: Any) -> None:
    """`torch.save` to a file beside `path`, flushed to disk, then renamed over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_tensors(path: Path) -> dict[str, Any]:
    """Unpickle tensors and plain containers, nothing else. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} contains Python objects other than tensors and is refused; "
                "save its state dict alone, or use safetensors"
            ) from None
        raise CheckpointError(f"{path} is no PyTorch checkpoint, or a damaged one") from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError):
        raise CheckpointError(f"{path} is no PyTorch checkpoint, or a truncated one; copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _load_native(path: Path) -> Checkpoint:
    content = read_tensors(path)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a {FORMAT} file (train one, or give a folder with params.json)")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{path} has format version {content.get('version')}, this is {VERSION}: upgrade blt-lm")
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


Model = TypeVar("Model", bound=nn.Module)


def fill(model: Model, state: Mapping[str, Tensor] | None, source: Path) -> Model:
    """Copy a state dict into a model, as float32; every tensor that does not fit is named. Raises CheckpointError."""
    own = model.state_dict()
    state = state if isinstance(state, dict) else {}
    problems = [f"missing {name}" for name in own if name not in state]
    problems += [f"unknown {name}" for name in state if name not in own]
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        raise CheckpointError(f"{source}: tensors do not fit the configuration: " + "; ".join(problems))
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.eval()


def _load_reference(path: Path, entropy_path: Path) -> Checkpoint:
    params, weights = reference.read_params(path), reference.read_weights(path)
    try:
        if params.get("train_entropy_model"):
            return Checkpoint(None, _reference_entropy(path), None)
        rule = reference.patch_rule(params)
        config = reference.blt_config(params, weights)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {error.errors()[0]['msg']}") from None
    except KeyError as error:
        raise CheckpointError(f"{path / reference.PARAMS} lacks the argument {error}") from None
    with torch.device("meta"):
        names = list(BLT(config).state_dict())
    state = reference.our_state(weights, names, config.hash.n_tables if config.hash else 0)
    entropy = _reference_entropy(entropy_path) if reference.is_reference(entropy_path) else None
    return Checkpoint(fill(BLT(config), state, path), entropy, rule)


def _reference_entropy(path: Path) -> EntropyModel:
    params, weights = reference.read_params(path), reference.read_weights(path)
    config = reference.entropy_config(params, weights)
    with torch.device("meta"):
        names = list(EntropyModel(config).state_dict())
    return fill(EntropyModel(config), reference.our_state(weights, names, 0, entropy=True), path)
