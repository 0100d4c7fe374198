"""Export: a checkpoint becomes a bundle of ONNX graphs that `blt_runtime` runs.

The pipeline is the list `blt_export.pipeline.STEPS`.
"""

from .job import ExportReport, StepReport
from .pipeline import export

__all__ = ["ExportReport", "StepReport", "export"]
