"""One graph through TensorRT's parser and builder. The module is an argument: `tensorrt` or `tensorrt_rtx`.

Networks are strongly typed: TensorRT computes in the graph's types, and float32 is no TF32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blt_runtime.bundle.spec import GraphSpec

Shapes = tuple[tuple[int, ...], ...]
Profile = Mapping[str, Shapes]
"""(least, usual, most) shape of each input with variable sizes."""


class Refused(Exception):
    """TensorRT does not accept a graph. The message is one line that names it."""


@dataclass(frozen=True)
class Built:
    """A built graph: the serialised engine, layers and names of the outputs of its network, seconds of parsing and
    building."""

    plan: Any
    layers: int
    outputs: tuple[str, ...]
    seconds: float


def build(
    trt: Any,
    log: Any,
    spec: GraphSpec,
    parse: Callable[[Any], bool],
    profiles: Sequence[Profile],
    configure: Callable[[Any], None] = lambda config: None,
) -> Built:
    """Builds an engine. log: of `logger`. parse: gives the parser its graph. configure: sets options of the builder.

    Raises Refused for a graph that does not parse or build, and for an input that is dropped.
    """
    log.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED.value)
    parser = trt.OnnxParser(network, log)
    started = time.perf_counter()
    if not parse(parser):
        raise Refused(f"{spec.name} is refused: {_parser_errors(parser)}")
    _allow_decomposition(trt, network)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    names = {network.get_input(i).name for i in range(network.num_inputs)}
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name in shapes.keys() & names:
            profile.set_shape(name, *shapes[name])
        config.add_optimization_profile(profile)
    configure(config)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refused(f"{spec.name} does not build: {'; '.join(log.errors) or 'no reason given'}")
    clocks = {"positions", "doc_start"} if spec.cache is None else set()  # without attention, no node reads them
    dropped = [t.name for t in spec.inputs if t.name not in names - (set(log.unused) - clocks)]
    if dropped:
        raise Refused(f"{spec.name} ignores its inputs {', '.join(dropped)}")
    outputs = tuple(network.get_output(i).name for i in range(network.num_outputs))
    return Built(plan, network.num_layers, outputs, time.perf_counter() - started)


def shapes_of(spec: GraphSpec, *sizes: Mapping[str, int]) -> dict[str, Shapes]:
    """The shapes of all inputs with variable sizes, for each of `sizes`: numbers in the place of letters."""
    varying = [t for t in spec.inputs if any(isinstance(size, str) for size in t.shape)]
    return {tensor.name: tuple(tensor.resolve(**numbers) for numbers in sizes) for tensor in varying}


def logger(trt: Any) -> Any:
    """A logger that keeps errors and the names of unused inputs. TensorRT uses the first one that is alive."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.clear()

        def clear(self) -> None:
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
