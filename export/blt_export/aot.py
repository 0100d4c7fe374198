"""The compile gate: TensorRT-RTX parses a portable graph and builds it ahead of time, without a GPU or a driver.

It proves that TensorRT's ONNX front end and graph compiler accept the graph and use all its inputs. It proves neither
speed nor numerics.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from blt_runtime.bundle.manifest import Manifest
from blt_runtime.bundle.spec import GraphSpec
from blt_runtime.errors import CheckFailed, MissingExtra, UsageError

from .tensorrt import Refused, build, logger, shapes_of

Range = tuple[int, int, int]

#: (least, usual, most) of each letter of a graph's shapes, for the optimisation profile.
DEFAULT_RANGES: dict[str, Range] = {
    "B": (1, 1, 4),
    "S": (1, 1, 64),
    "P": (1, 1, 16),
    "L": (1, 8, 64),
    "N": (1, 8, 256),
    "R": (1, 2, 64),
}


@dataclass(frozen=True)
class Compiled:
    """A graph that was built: seconds of parsing and building, bytes of the plan, names of the network's outputs."""

    graph: str
    layers: int
    seconds: float
    plan_bytes: int
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Attempt:
    """One graph of a bundle at the gate: why it was refused, or None, and the seconds that it took."""

    graph: str
    refused: str | None
    seconds: float


def check_arguments(flavour: str) -> None:
    """The checks that need no bundle. Raises UsageError (another flavour than portable) and MissingExtra."""
    if flavour != "portable":
        raise UsageError(f"the compile gate is for the flavour portable, not {flavour}: TensorRT lacks its operators")
    _library()


def compile_bundle(folder: Path, manifest: Manifest) -> tuple[Attempt, ...]:
    """Try every graph of a bundle, also after a refusal.

    Raises UsageError (a bundle of another flavour than portable) and MissingExtra (tensorrt-rtx is not installed).
    """
    check_arguments(manifest.flavour)
    return tuple(_attempt(folder / ref.file, manifest.spec.graphs[name]) for name, ref in manifest.graphs.items())


def _attempt(path: Path, spec: GraphSpec) -> Attempt:
    started, refused = time.perf_counter(), None
    try:
        compile_graph(path, spec)
    except CheckFailed as error:
        refused = str(error)
    return Attempt(spec.name, refused, time.perf_counter() - started)


def compile_graph(
    path: str | Path, spec: GraphSpec, ranges: dict[str, Range] | None = None, architectures: Sequence[str] = ()
) -> Compiled:
    """Compile one portable graph. `architectures` are names such as SM89; with none, the builder chooses.

    Raises CheckFailed (refused, or an input is dropped) and MissingExtra (tensorrt-rtx is not installed).
    """
    trt = _library()
    sizes = {**DEFAULT_RANGES, **(ranges or {})}
    profile = shapes_of(spec, *({letter: of[i] for letter, of in sizes.items()} for i in range(3)))
    try:
        built = build(
            trt,
            logger(trt),
            spec,
            lambda parser: parser.parse_from_file(str(path)),
            [profile],
            lambda config: _target(trt, config, architectures),
        )
    except Refused as error:
        raise CheckFailed(f"compile gate: {error}") from error
    return Compiled(spec.name, built.layers, built.seconds, built.plan.nbytes, built.outputs)


def _library() -> ModuleType:
    try:
        return importlib.import_module("tensorrt_rtx")
    except ImportError:
        raise MissingExtra("tensorrt-rtx", "aot") from None


def _target(trt: Any, config: Any, architectures: Sequence[str]) -> None:
    if architectures:
        config.num_compute_capabilities = len(architectures)
        for i, name in enumerate(architectures):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
