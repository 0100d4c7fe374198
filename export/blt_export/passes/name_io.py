"""Name inputs, outputs and symbolic sizes exactly as the graph's specification does.

Rules
1. The i-th graph input (output) gets the name of the i-th input (output) of the spec.
2. Every symbolic size gets the spec's letter (B, S, ...), in all values of the graph.
3. An input or output whose element type, rank or fixed sizes differ from the spec is an error, because the runtime
   relies on the spec. Sizes of the caches may differ; fix_capacity sets them.

Requires: a captured graph. Ensures: names, element types and letters of the spec.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from blt_runtime.bundle.spec import GraphSpec, TensorSpec

from ..rewrite import dims

TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
}


def run(model: ir.Model, spec: GraphSpec) -> int:
    graph = model.graph
    letters: dict[str, str] = {}
    changed = 0
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        if len(values) != len(tensors):
            raise ValueError(f"graph {spec.name} has {len(values)} values where its spec has {len(tensors)}")
        names = [value.name for value in values]
        for value, tensor in zip(values, tensors, strict=True):
            _check_type(spec.name, value, tensor)
            _collect(letters, value, tensor)
            changed += value.name != tensor.name
        if names != [t.name for t in tensors]:
            _rename(values, tensors)
    return changed + _rename_sizes(graph, letters)


def _check_type(graph: str, value: ir.Value, tensor: TensorSpec) -> None:
    if value.dtype is not TYPES[tensor.dtype]:
        raise ValueError(f"{graph}: {tensor.name} has type {value.dtype}, but its graph spec has {tensor.dtype}")
    sizes = dims(value)
    if sizes is None or tensor.name.startswith(("past_", "present_")):  # `fix_capacity` sets the caches' sizes
        return
    pairs = list(zip(sizes, tensor.shape, strict=False))
    if len(sizes) != len(tensor.shape) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        raise ValueError(f"{graph}: {tensor.name} has shape {sizes}, but its graph spec has {list(tensor.shape)}")


def _collect(letters: dict[str, str], value: ir.Value, tensor: TensorSpec) -> None:
    """Record the spec's letter for each symbol of the exporter."""
    sizes = dims(value)
    if sizes is None or len(sizes) != len(tensor.shape):
        return
    for size, want in zip(sizes, tensor.shape, strict=True):
        if isinstance(size, str) and isinstance(want, str):
            letters.setdefault(size, want)


def _rename(values: Sequence[ir.Value], tensors: tuple[TensorSpec, ...]) -> None:
    for value in values:
        value.name = None
    for value, tensor in zip(values, tensors, strict=True):
        value.name = tensor.name
        value.shape = ir.Shape(list(tensor.shape))


def _rename_sizes(graph: ir.Graph, letters: dict[str, str]) -> int:
    renamed = 0
    for value in (v for node in graph for v in node.outputs):
        sizes = dims(value)
        if sizes is None:
            continue
        new = [letters.get(size, size) if isinstance(size, str) else size for size in sizes]
        if new != sizes:
            value.shape = ir.Shape(new)
            renamed += 1
    return renamed
