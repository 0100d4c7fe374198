"""Hugging Face folders that tests write, change and break; `transformers` is not needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blt.checkpoint import huggingface
from blt.checkpoint.models import Checkpoint
from blt.checkpoint.tensors import StoredTensor

safetensors = pytest.importorskip("safetensors.torch", reason="the format: pip install safetensors")


def write(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None = None) -> Path:
    huggingface.write(checkpoint.to_source(Path("memory.pt")), folder, dtype)
    return folder


def rows(tensor: StoredTensor) -> torch.Tensor:
    return torch.cat(list(tensor.blocks()))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def load_state(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = safetensors.load_file(folder / "model.safetensors")
    return state


def save_state(folder: Path, state: dict[str, torch.Tensor], file: str = "model.safetensors") -> None:
    safetensors.save_file(state, folder / file, metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, str]:
    """Splits the weights of the folder into two files with an index; returns its weight_map."""
    state = load_state(folder)
    names = {name: f"model-0000{1 + ('patcher' in name)}-of-00002.safetensors" for name in state}
    for file in set(names.values()):
        save_state(folder, {name: state[name] for name in state if names[name] == file}, file)
    (folder / "model.safetensors").unlink()
    write_index(folder, names)
    return names


def write_index(folder: Path, names: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
