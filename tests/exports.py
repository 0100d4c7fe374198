"""Exports of the tiny variants. Capture takes most of an export, so a process captures the graphs of a variant once."""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx_ir as ir

from blt_export import pipeline
from blt_export.state import ExportState
from tests.tiny import tiny

CAPACITY, CHUNK = 600, 32


@cache
def captured(variant: str, capacity: int, chunk: int) -> dict[str, ir.Model]:
    """The captured graphs by name: empty until the first export of the variant fills it."""
    return {}


def prepare(
    variant: str, flavour: str = "ort", *, capacity: int = CAPACITY, chunk: int = CHUNK, **options: Any
) -> ExportState:
    """The state of an export of `variant`; `options` are those of `pipeline.prepare`."""
    state = pipeline.prepare(tiny(variant), flavour, capacity=capacity, chunk=chunk, **options)
    state.captured = captured(variant, capacity, chunk)
    return state
