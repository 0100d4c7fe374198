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
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    started = time.perf_counter()
    if not parser.parse_from_file(str(path)):
        raise CheckFailed(f"compile gate: {spec.name} is refused: {_parser_errors(parser)}")
    _allow_decomposition(trt, network)
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, network, spec, {**DEFAULT_RANGES, **(ranges or {})}))
    _target(trt, config, architectures)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise CheckFailed(f"compile gate: {spec.name} does not build: {'; '.join(log.errors) or 'no reason given'}")
    used = {network.get_input(i).name for i in range(network.num_inputs)} - set(log.unused)
    dropped = [t.name for t in spec.inputs if t.name not in used]
    if dropped:
        raise CheckFailed(f"compile gate: {spec.name} ignores its inputs {', '.join(dropped)}")
    outputs = tuple(network.get_output(i).name for i in range(network.num_outputs))
    return Compiled(
        spec.name,
        layers=network.num_layers,
        seconds=time.perf_counter() - started,
        plan_bytes=plan.nbytes,
        outputs=outputs,
    )


def _library() -> ModuleType:
    try:
        return importlib.import_module("tensorrt_rtx")
    except ImportError:
        raise MissingExtra("tensorrt-rtx", "aot") from None


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.unused: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif message.startswith("Unused Input: "):
                self.unused.append(message.removeprefix("Unused Input: "))

    return Log()


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return "; ".join(f"{e.node_operator() or '?'} {e.node_name() or ''}: {e.desc()}" for e in errors)


def _allow_decomposition(trt: Any, network: Any) -> None:
    """Attention has fused kernels for fp16 and bf16 only; in float32 it must be decomposed into simple layers."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _profile(builder: Any, network: Any, spec: GraphSpec, ranges: dict[str, Range]) -> Any:
    profile = builder.create_optimization_profile()
    names = {network.get_input(i).name for i in range(network.num_inputs)}
    for tensor in spec.inputs:
        if tensor.name in names and any(isinstance(size, str) for size in tensor.shape):
            shapes = [tensor.resolve(**{letter: r[i] for letter, r in ranges.items()}) for i in range(3)]
            profile.set_shape(tensor.name, *shapes)
    return profile


def _target(trt: Any, config: Any, architectures: Sequence[str]) -> None:
    if architectures:
        config.num_compute_capabilities = len(architectures)
        for i, name in enumerate(architectures):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
