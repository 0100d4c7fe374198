"""The state that the steps of an export share, and the report of a finished one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from blt.checkpoint.models import Checkpoint
from blt.model.steps import StepModule
from blt_runtime.bundle.manifest import Manifest, Parity
from blt_runtime.bundle.spec import ModelSpec

from .quantize import matrices
from .specs import Flavour
from .verify.parity import ParityReport


@dataclass(frozen=True)
class StepReport:
    """What a step changed, and how many seconds it took."""

    name: str
    changed: str
    seconds: float


@dataclass(frozen=True)
class ExportReport:
    """A finished export: the bundle's manifest, its parity rows, node counts and the log of its steps.

    near_threshold, margin: of `verify.parity.ParityReport`."""

    path: Path
    manifest: Manifest
    near_threshold: tuple[int, ...]
    margin: float
    nodes: dict[str, int]
    steps: tuple[StepReport, ...]

    @property
    def parity(self) -> tuple[Parity, ...]:
        return self.manifest.parity

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.manifest.files.values())

    def to_json(self) -> dict[str, Any]:
        """The manifest's content, the steps, the node counts, and how many of the checked entropies are within a margin
        of the threshold; null where entropies were not compared with it."""
        steps = [{"name": s.name, "changed": s.changed, "seconds": round(s.seconds, 3)} for s in self.steps]
        return {**self.manifest.to_json(), "steps": steps, "nodes": self.nodes, "near_threshold": self.near_json()}

    def near_json(self) -> dict[str, Any] | None:
        checked = next((row.positions for row in self.parity if row.output == "entropy.entropy"), None)
        if not self.margin or checked is None:
            return None
        return {"entropies": len(self.near_threshold), "of": checked, "margin": self.margin}


@dataclass
class ExportState:
    """The state that the steps share. An export of the other flavour may reuse `captured`: one capture serves both."""

    checkpoint: Checkpoint
    spec: ModelSpec
    flavour: Flavour
    precision: str
    check: bool
    precisions: dict[str, str] = field(default_factory=dict)
    eval_ids: Sequence[npt.NDArray[np.int64]] = ()
    chat_template: str | None = None
    folder: Path = Path()
    modules: dict[str, StepModule] = field(default_factory=dict)
    captured: dict[str, ir.Model] = field(default_factory=dict)
    graphs: dict[str, ir.Model] = field(default_factory=dict)
    quantised: dict[str, matrices.Outcome] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    row_files: dict[str, Path] = field(default_factory=dict)
    resident_files: dict[str, Path] = field(default_factory=dict)
    table_file: Path | None = None
    parity: ParityReport = field(default_factory=lambda: ParityReport((), ()))
    manifest: Manifest | None = None


@dataclass(frozen=True)
class Step:
    """An entry of `pipeline.STEPS`."""

    name: str
    run: Callable[[ExportState], str]
