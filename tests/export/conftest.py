"""Two tiny models that between them use every option of the architecture, each captured once for the whole session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from blt_export import ExportReport, pipeline
from tests.export.variants import CAPACITY, CHUNK, MakeJob
from tests.tiny import tiny


@pytest.fixture(scope="session")
def make_job() -> MakeJob:
    """(variant, flavour) -> a job; capturing is done by the first job of a variant."""
    captured: dict[str, dict[str, ir.Model]] = {}

    def make(variant: str, flavour: str) -> pipeline.Job:
        job = pipeline.make_job(tiny(variant), flavour, capacity=CAPACITY, chunk=CHUNK)
        job.captured = captured.setdefault(variant, {})
        return job

    return make


@pytest.fixture(scope="session")
def bundle_of(make_job: MakeJob, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], ExportReport]:
    """(variant, flavour) -> the report of its export, whose `path` is the bundle."""
    done: dict[tuple[str, str], ExportReport] = {}

    def export(variant: str, flavour: str) -> ExportReport:
        if (variant, flavour) not in done:
            folder: Path = tmp_path_factory.mktemp("bundles") / f"{variant}-{flavour}"
            done[variant, flavour] = pipeline.run(make_job(variant, flavour), folder)
        return done[variant, flavour]

    return export
