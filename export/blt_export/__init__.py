"""Export: a checkpoint becomes a bundle of ONNX graphs that `blt_runtime` runs.

The pipeline is the list `blt_export.pipeline.STEPS`.
"""

from .pipeline import export
from .state import ExportReport, StepReport

__all__ = ["ExportReport", "StepReport", "export"]
