"""How far results are from those of a reference, and how far they may be at each precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from blt.evaluate.provider_check import TOLERANCES
from blt_runtime.bundle.manifest import Measure

TOLERANCE = {**TOLERANCES, "int8": 0.1, "int4": 0.6}


def largest(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> float:
    """max |got - want| / max(1, |want|), where |want| is the largest of the vector, along the last axis. In two
    dimensions each number is its own vector. What is not finite counts as infinite."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return math.inf
    size = np.abs(want) if want.ndim == 2 else np.abs(want).max(-1, keepdims=True)
    return float((np.abs(got - want) / np.maximum(1.0, size)).max(initial=0.0))


def relative_rms(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> float:
    """Root mean square of got - want, relative to that of want. What is not finite counts as infinite."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return math.inf
    size = math.sqrt(np.square(want, dtype=np.float64).mean())
    return math.sqrt(np.square(got - want, dtype=np.float64).mean()) / (size or 1.0)


MEASURES: dict[Measure, Callable[[npt.NDArray[Any], npt.NDArray[Any]], float]] = {
    "largest": largest,
    "rms": relative_rms,
}


def measure_of(precision: str) -> Measure:
    """How the error of an output is measured. Below float32 single numbers differ by design."""
    return "largest" if precision == "fp32" else "rms"
