"""Graphs for many streams: the same graph over a flat list of tokens that belong to rows of a shared cache.

All products, norms and rotations work on tokens one by one, so a call takes the tokens of any streams side by side, as
one row. Only attention knows whose they are: its queries, keys and values are dealt out to the caches' rows, and its
results are put back in line. A row may give one token, several, or none (it is idle, and costs nothing).

Rules
1. GroupQueryAttention(q, k, v, past, ...) becomes GatherND(GroupQueryAttention(GatherND(q, slots), GatherND(k, slots),
   GatherND(v, slots), past, ..., query_seqlens=counts), back); its lengths are the inputs below.
2. The input doc_start goes (the host gives lengths within the document); these inputs come, all int64:
   slots [Q, M, 2]   (0, token) that row q feeds as its m-th; anything valid behind a row's count
   back [1, S, 2]    (row, m) of each token
   lengths [Q]       entries of each row's cache behind this call, in its document (at least 1)
   counts [Q]        tokens of each row in this call
3. Caches are [Q, G, C, K]: rows, and of caches that never evict the capacity, are chosen when they are made.

Requires: attention lowered to GroupQueryAttention. Ensures: weights are those of the graph it was made from, by name
and place, so both are stored once. ONNX Runtime 1.32 knows the input query_seqlens.

Letters: S tokens of the call (P patches in the latent graph), Q rows of the caches, M most tokens of one row,
G key/value heads, C cache slots, K head size.
"""

from __future__ import annotations

import onnx_ir as ir

from blt_runtime.bundle.spec import GraphSpec, TensorSpec, row_spec
from blt_runtime.errors import UsageError

from ..lower.ort import CONTRIB
from ..rewrite import Builder, nodes, replace
from . import cleanup

_PAST, _ROTARY, _OTHERS = slice(3, 5), slice(7, 10), slice(10, None)


def takes(model: ir.Model, spec: GraphSpec) -> bool:
    """Whether the graph has a form for many streams: all its caches are GroupQueryAttention's."""
    return len(nodes(model, "GroupQueryAttention", CONTRIB)) * 2 == len(spec.aliases)


def run(model: ir.Model, spec: GraphSpec) -> ir.Model:
    """A copy of the lowered graph in this form; initializers are shared with `model`."""
    if not takes(model, spec):
        raise UsageError(f"graph {spec.name} has no form for many streams: its attention is not GroupQueryAttention")
    rows = model.clone()
    wanted = row_spec(spec)
    inputs = {value.name: value for value in rows.graph.inputs}
    added = {t.name: _input(t) for t in wanted.inputs if t.name not in inputs}
    rows.graph.inputs.extend(added.values())
    first = Builder(rows.graph, rows.graph[0])
    slots, back = added["slots"], added["back"]
    routing = (slots, back, *_lengths(first, added["lengths"], slots), _int32(first, added["counts"]))
    for node in nodes(rows, "GroupQueryAttention", CONTRIB):
        _route(rows.graph, node, *routing)
    cleanup.run(rows)
    _order_inputs(rows.graph, wanted)
    return rows


def _input(tensor: TensorSpec) -> ir.Value:
    return ir.Value(name=tensor.name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(list(tensor.shape)))


def _int32(b: Builder, value: ir.Value) -> ir.Value:
    cast: ir.Value = b.op("Cast", value, to=ir.DataType.INT32)
    return cast


def _lengths(b: Builder, lengths_Q: ir.Value, slots_QM2: ir.Value) -> tuple[ir.Value, ir.Value]:
    """seqlens_k [Q], one less, and total_sequence_length: a bound of all lengths, and of the room for tokens."""
    ends_Q = _int32(b, b.op("Sub", lengths_Q, b.const(1)))
    room = b.op("Squeeze", b.op("Shape", slots_QM2, start=1, end=2))
    return ends_Q, _int32(b, b.op("Max", b.op("ReduceMax", lengths_Q, keepdims=0), room))


def _route(
    graph: ir.Graph, node: ir.Node, slots: ir.Value, back: ir.Value, ends: ir.Value, longest: ir.Value, counts: ir.Value
) -> None:
    if any(value is not None for value in node.inputs[_OTHERS]):
        raise ValueError("an attention with further inputs cannot be dealt out to rows")
    b = Builder(graph, node)
    q, k, v = (value and b.op("GatherND", value, slots) for value in node.inputs[:3])  # packed: all in the first
    cos, sin, positions = [*node.inputs[_ROTARY], None, None, None][:3]
    if positions is not None:
        positions = b.op("GatherND", positions, slots)
    unused = [None] * 6  # attention_bias, head_sink, k_scale, v_scale, q_norm_weight, k_norm_weight
    attributes = {a.name: a.as_int() for a in node.attributes.values()}
    out, key, value = b.op(
        "GroupQueryAttention",
        *(q, k, v, *node.inputs[_PAST], ends, longest, cos, sin, positions, *unused, counts),
        domain=CONTRIB,
        outputs=3,
        attributes=attributes,
    )
    replace(node, [b.op("GatherND", out, back), key, value])


def _order_inputs(graph: ir.Graph, wanted: GraphSpec) -> None:
    """Inputs and caches as the spec lists them; what it does not list is used by nobody."""
    by_name = {value.name: value for value in graph.inputs}
    for name, value in by_name.items():
        if not wanted.has_input(str(name)) and value.uses():
            raise ValueError(f"the input {name} is still used")
    graph.inputs.clear()
    for tensor in wanted.inputs:
        value = by_name[tensor.name]
        value.shape = ir.Shape(list(tensor.shape))
        graph.inputs.append(value)
    shapes = {t.name: t.shape for t in wanted.outputs}
    for value in graph.outputs:
        value.shape = ir.Shape(list(shapes[str(value.name)]))
