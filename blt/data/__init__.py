"""Data: text to shards of bytes, patch boundaries computed ahead of the step, and rows of static shape.

`prepare` writes a data folder, `info` describes one, `Dataset` reads it. `PatchIndex` adds the boundaries of a frozen
entropy model, `Loader` cuts the documents into rows and batches of a few fixed shapes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blt.data.batches import Batch, BatchShape, PatchStarts, TokenSource
    from blt.data.dataset import Dataset, Documents, info
    from blt.data.packing import Loader
    from blt.data.patches import PatchIndex, choose_threshold
    from blt.data.prepare import prepare

__all__ = [
    "Batch",
    "BatchShape",
    "Dataset",
    "Documents",
    "Loader",
    "PatchIndex",
    "PatchStarts",
    "TokenSource",
    "choose_threshold",
    "info",
    "prepare",
]
_MODULES = {
    "batches": ("Batch", "BatchShape", "PatchStarts", "TokenSource"),
    "dataset": ("Dataset", "Documents", "info"),
    "packing": ("Loader",),
    "patches": ("PatchIndex", "choose_threshold"),
    "prepare": ("prepare",),
}


def __getattr__(name: str) -> Any:
    """Imports a name's module on first use: `patches` loads torch, and a bundle needs none of them."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
