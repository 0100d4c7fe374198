"""Data: text to shards of bytes, patch boundaries computed ahead of the step, and rows of static shape.

`prepare` writes a data folder, `info` describes one, `Dataset` reads it. `PatchIndex` adds the boundaries of a frozen
entropy model, `Loader` cuts the documents into rows and batches of a few fixed shapes.
"""

from typing import TYPE_CHECKING, Any

from blt.data.batches import Batch, BatchShape, PatchStarts, TokenSource
from blt.data.dataset import Dataset, Documents, info
from blt.data.packing import Loader
from blt.data.prepare import prepare

if TYPE_CHECKING:
    from blt.data.patches import PatchIndex, choose_threshold

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


def __getattr__(name: str) -> Any:
    """Imports `patches` on first use: it loads torch, which data preparation must not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from blt.data import patches

    return getattr(patches, name)
