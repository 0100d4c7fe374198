"""Half precision on a processor without its kernels: float32 arithmetic, rounded to half after each node.

ONNX Runtime's CPU kernels have no bfloat16. So parity of a bfloat16 graph, and its bits per byte, are measured with a
copy in which every half value is a float32 value that was rounded to half: constants, caches, and the results of every
node. This is what a GPU computes, but for the order of its additions. It is also the slow reference of float16 kernels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir

from blt_runtime import Model
from blt_runtime.backends.onnx import OnnxBackend
from blt_runtime.bundle.bundle import Bundle, entry_of
from blt_runtime.bundle.manifest import QUANTISED
from blt_runtime.bundle.spec import GraphSpec, ModelSpec, TensorSpec

from ..graph_files import write_graph
from ..passes.halve import HALVES
from ..rewrite import Builder, node_after

_HALF = {half for _, half in HALVES.values()}


Change = Callable[[ir.Model], object]


@contextmanager
def on_cpu(bundle: Bundle, scratch: Path | None = None, changes: Mapping[str, Change] | None = None) -> Iterator[Model]:
    """The bundle on ONNX Runtime's CPU; in bfloat16, an emulation. scratch: where a temporary folder is made for it.
    changes: how graphs are rewritten first, in an emulation, too."""
    manifest = bundle.manifest
    precisions = {name: manifest.precision_of(name) for name in manifest.graphs}
    if "bf16" not in precisions.values() and not changes:
        yield Model(manifest.spec, OnnxBackend(bundle), bundle.hash_tables(), manifest=manifest)
        return
    with graphs({name: bundle.graph_file(name) for name in manifest.graphs}, scratch, changes or {}) as folder:
        spec, listed = float_spec(manifest.spec), {path.name: entry_of(path) for path in folder.iterdir()}
        wide = {name: p if p in QUANTISED else "fp32" for name, p in precisions.items()}
        emulated = replace(manifest, spec=spec, files=listed, precisions=wide)
        yield Model(spec, OnnxBackend(Bundle(folder, emulated)), bundle.hash_tables(), manifest=emulated)


@contextmanager
def graphs(
    files: Mapping[str, Path], scratch: Path | None = None, changes: Mapping[str, Change] = MappingProxyType({})
) -> Iterator[Path]:
    """Emulations of graphs, under the names of their files, in a temporary folder. changes: made first."""
    with tempfile.TemporaryDirectory(prefix="blt-emulated-", dir=scratch) as folder:
        for name, path in files.items():
            model = ir.load(path)
            if name in changes:
                changes[name](model)
            write_graph(run(model), Path(folder), name)
        yield Path(folder)


def float_spec(spec: ModelSpec) -> ModelSpec:
    """The specification of the emulations of all graphs."""
    return replace(spec, graphs={name: _float_graph(graph) for name, graph in spec.graphs.items()})


def _float_graph(graph: GraphSpec) -> GraphSpec:
    half = {dtype for dtype, _ in HALVES.values()}

    def tensor(of: TensorSpec) -> TensorSpec:
        return replace(of, dtype="float32") if of.dtype in half else of

    return replace(graph, inputs=tuple(map(tensor, graph.inputs)), outputs=tuple(map(tensor, graph.outputs)))


def run(model: ir.Model) -> ir.Model:
    """A float32 copy of a half graph whose values are rounded as in the original."""
    made = model.clone()
    graph = made.graph
    for name in list(graph.initializers):
        value = graph.initializers[name]
        if value.dtype in _HALF:
            _widen(value)
    nodes = list(graph)
    for node in nodes:
        target = node.attributes.get("to")
        if node.op_type == "Cast" and target is not None and ir.DataType(target.as_int()) in _HALF:
            continue
        for value in node.outputs:
            if value.dtype in _HALF:
                _round(graph, node, value)
    for node in nodes:
        target = node.attributes.get("to")
        if node.op_type == "Cast" and target is not None and ir.DataType(target.as_int()) in _HALF:
            _widen_after(graph, node, node.outputs[0])
    for value in graph.inputs:
        if value.dtype in _HALF:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    return made


def _widen(value: ir.Value) -> None:
    tensor = value.const_value
    assert tensor is not None
    value.const_value = ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().astype("float32"), name=value.name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(tensor.shape.numpy()),
        name=value.name,
    )
    value.type = ir.TensorType(ir.DataType.FLOAT)


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """All readers of a node's result, and the graph's output, read it rounded."""
    half = value.dtype
    assert half is not None
    value.type = ir.TensorType(ir.DataType.FLOAT)
    b = Builder(graph, node_after(graph, node))
    rounded = b.op("Cast", value, to=half, dtype=half)
    _replace(graph, value, b.op("Cast", rounded, to=ir.DataType.FLOAT, dtype=ir.DataType.FLOAT), rounded.producer())


def _widen_after(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    b = Builder(graph, node_after(graph, node))
    wide = b.op("Cast", value, to=ir.DataType.FLOAT, dtype=ir.DataType.FLOAT)
    _replace(graph, value, wide, wide.producer())


def _replace(graph: ir.Graph, old: ir.Value, new: ir.Value, keeps: ir.Node | None) -> None:
    new.shape = old.shape
    for reader, index in list(old.uses()):
        if reader is not keeps:
            reader.replace_input_with(index, new)
    if old.is_graph_output():
        graph.outputs[list(graph.outputs).index(old)] = new
        old.name, new.name = f"{old.name}.exact", old.name
