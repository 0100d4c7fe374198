"""Byte Latent Transformers: the model, its checkpoints, its training and the command line.

`import blt` loads no heavy library: the names below import PyTorch when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blt.checkpoint.models import Checkpoint, load, save
    from blt.model import BLT, BLTConfig, EntropyConfig, EntropyModel, HashConfig, TransformerConfig

__version__ = "0.1.0"

__all__ = [
    "BLT",
    "BLTConfig",
    "Checkpoint",
    "EntropyConfig",
    "EntropyModel",
    "HashConfig",
    "TransformerConfig",
    "__version__",
    "load",
    "save",
]

_CHECKPOINT = ("Checkpoint", "load", "save")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("blt.checkpoint.models" if name in _CHECKPOINT else "blt.model"), name)
