"""Export: a checkpoint becomes a bundle of ONNX graphs that `blt_runtime` runs; a bundle becomes TensorRT engines.

The pipeline of an export is the list `blt_export.pipeline.STEPS`. Engines (`blt_export.build`) need no PyTorch, so the
names of this package are imported when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import export
    from .state import ExportReport, StepReport

__all__ = ["ExportReport", "StepReport", "export"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".pipeline" if name == "export" else ".state", __name__), name)
