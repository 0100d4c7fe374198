"""Tensors on disk and into models: the one place that opens pickled files, and never runs what is in them."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from blt_runtime.errors import CheckpointError

Model = TypeVar("Model", bound=nn.Module)


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
                f"{path} contains Python objects other than tensors and is refused; save its state dict alone"
            ) from None
        raise CheckpointError(f"{path} is no PyTorch checkpoint, or a damaged one") from None
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OSError):
        raise CheckpointError(f"{path} is no PyTorch checkpoint, or a truncated one; copy it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def fill(model: Model, state: Mapping[str, Tensor] | None, source: Path) -> Model:
    """Copy a state dict into a model, as float32; every tensor that does not fit is named. Raises CheckpointError."""
    own = model.state_dict()
    state = {n: t for n, t in state.items() if isinstance(t, Tensor)} if isinstance(state, dict) else {}
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
