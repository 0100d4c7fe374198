"""Byte states and patch vectors in memory of the graphs (`spec.resident_spec`), for hosts that cannot see it.

Without it, each step copies the byte state of the encoder, and the patch vector of the latent transformer, to the host
and back.

Rules, S positions and P patches of one call (B is 1)
1. encoder: the output byte_states [1, S, X, D] is written to the rows `positions` of the input past_states.
2. latent: the output patch_kv [1, P, ...] is written to the rows of the new input patch_row [1, P] of past_patches.
3. latent, decoder: the pools byte_states [N, X, D] and patch_kv [R, ...] are views of this memory.
4. decoder: the input byte_states [1, S, X, D] is read from the rows `positions` of the memory.
5. latent: the number of an entry in its patch, Range(L), is byte_index less the first of the patch. The host fills the
   entries after a patch with the row after it, so that they count as too late. This and 6 leave no node that a device
   would leave to the host, so that calls can be captured.
6. The shape of a value [B, S, ...] is [1, -1, ...].
Of a batched graph (`batch_rows`), the rows are the new input state_row instead of `positions`.
Of a padded graph (`spec.padded_spec`), memory is [B, 1, N, ...] and each of B rows writes its own (1, 2); reads are of
all rows together (3), the decoder's by the new input state_row (4); shapes keep B (no 6).

Memory [N, ...] is written by ScatterND, at any rows. Memory [1, 1, N, ...] is written by TensorScatter, which TensorRT
does in place; a call's rows are then consecutive.

Requires: a lowered graph whose inputs and outputs are those of the specification. Ensures: those of `resident_spec`;
weights have the names and file offsets of the original graph's, so both graphs share one file.
"""

from __future__ import annotations

import onnx_ir as ir

from blt_runtime.bundle.spec import RESIDENT, GraphSpec, TensorSpec

from ..rewrite import Builder, dims, nodes, static
from . import cleanup


def run(model: ir.Model, wanted: GraphSpec) -> ir.Model:
    """A copy of the graph with the interface `wanted`; initializers are shared with `model`."""
    made = model.clone()
    graph = made.graph
    inputs = {str(value.name): value for value in graph.inputs}
    for tensor in wanted.inputs:
        if tensor.name not in inputs:
            inputs[tensor.name] = new_input(tensor)
    first = Builder(graph, graph[0])
    if wanted.name in RESIDENT:
        past, output = RESIDENT[wanted.name]
        _write(graph, output, inputs[past], inputs["patch_row"] if wanted.name == "latent" else _state_rows(inputs))
    if wanted.name == "decoder":
        _read_states(inputs, wanted, first)
        _view(inputs, "patch_kv", wanted, first)
    if wanted.name == "latent":
        _view(inputs, "byte_states", wanted, first)
        _count_entries(made, inputs["byte_index"])
    if not any(map(_has_rows, wanted.inputs)):
        _fix_shapes(made)
    graph.inputs.clear()
    graph.inputs.extend(inputs[tensor.name] for tensor in wanted.inputs)
    outputs = {str(value.name): value for value in graph.outputs}
    graph.outputs.clear()
    graph.outputs.extend(outputs[tensor.name] for tensor in wanted.outputs)
    cleanup.run(made)
    return made


def _has_rows(tensor: TensorSpec) -> bool:
    """Whether it is memory of a padded graph: no other tensor is [B, 1, ...]."""
    return tensor.shape[:2] == ("B", 1)


def new_input(tensor: TensorSpec) -> ir.Value:
    """An input that a graph does not have yet."""
    dtype = ir.DataType[{"float32": "FLOAT"}.get(tensor.dtype, tensor.dtype.upper())]
    return ir.Value(name=tensor.name, type=ir.TensorType(dtype), shape=ir.Shape(list(tensor.shape)))


def _write(graph: ir.Graph, output: str, past: ir.Value, rows: ir.Value) -> None:
    """Replace the output by `past` with this call's vectors in `rows` [1, S]."""
    old = next(value for value in graph.outputs if value.name == output)
    sizes = dims(past)
    assert sizes is not None
    lead, width = [0 if isinstance(size, str) else size for size in sizes[:-2]], sizes[-1]
    b = Builder(graph, None)
    vectors = b.op("Reshape", old, b.const([*lead, -1, width]))
    if lead:
        first = b.op("Gather", rows, b.const(0), axis=1)
        new = b.op("TensorScatter", past, vectors, first, axis=-2, mode="linear")
    else:
        new = b.op("ScatterND", past, b.op("Reshape", rows, b.const([-1, 1])), vectors)
    new.type, new.shape = past.type, past.shape
    at = graph.outputs.index(old)
    graph.outputs[at] = new
    old.name, new.name = f"{output}_of_call", output


def _view(inputs: dict[str, ir.Value], name: str, wanted: GraphSpec, b: Builder) -> None:
    """Replace the pool `name` [N, ...] by a view of the memory that has its name now."""
    old, memory = inputs[name], new_input(wanted.tensor(name))
    sizes = dims(old)
    assert sizes is not None
    view = b.op("Reshape", memory, b.const([-1, *sizes[1:]]))
    _take_over(inputs, name, memory, view)


def _read_states(inputs: dict[str, ir.Value], wanted: GraphSpec, b: Builder) -> None:
    old, memory = inputs["byte_states"], new_input(wanted.tensor("byte_states"))
    layers, width = static(old, 2), static(old, 3)
    rows = b.op("Reshape", memory, b.const([-1, layers * width]))
    states = b.op("Gather", rows, _state_rows(inputs), axis=0)
    _take_over(inputs, "byte_states", memory, b.op("Reshape", states, b.const([0, 0, layers, width])))


def _count_entries(model: ir.Model, index_BPL: ir.Value) -> None:
    for node in nodes(model, "Range"):
        b = Builder(model.graph, node)
        entry = b.op("Sub", index_BPL, b.op("Gather", index_BPL, b.const([0]), axis=2), dtype=ir.DataType.INT64)
        entry.shape = index_BPL.shape
        ir.convenience.replace_all_uses_with(node.outputs[0], entry)


def _fix_shapes(model: ir.Model) -> None:
    for node in nodes(model, "Shape"):
        sizes = dims(node.inputs[0])
        if sizes is None or node.attributes or sizes[0] != "B":
            continue
        fixed = [1, *(size if isinstance(size, int) else -1 for size in sizes[1:])]
        if fixed.count(-1) <= 1 and all(user.op_type == "Reshape" for user in node.outputs[0].consumers()):
            ir.convenience.replace_all_uses_with(node.outputs[0], Builder(model.graph, node).const(fixed))


def _state_rows(inputs: dict[str, ir.Value]) -> ir.Value:
    return inputs["state_row"] if "state_row" in inputs else inputs["positions"]


def _take_over(inputs: dict[str, ir.Value], name: str, memory: ir.Value, value: ir.Value) -> None:
    """All readers of the old input read `value`, which is computed from the new one."""
    old = inputs[name]
    value.type, value.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, value)
    old.name, inputs[name] = None, memory
