"""Batched graphs: the same graph over a flat list of tokens that belong to rows of a shared cache.

Products, norms and rotations work on single tokens, so one call reads the tokens of all streams as one flat sequence.
Only attention depends on the stream: its queries, keys and values are gathered into the caches' rows, and its results
are gathered back into the sequence. In a call, a row may have one token, several, or none (it is idle, and costs
nothing).

Rules
1. GroupQueryAttention(q, k, v, past, ...) becomes GatherND(GroupQueryAttention(GatherND(q, slots), GatherND(k, slots),
   GatherND(v, slots), past, ..., query_seqlens=counts), back); its lengths are the inputs below.
2. The input doc_start goes (the host gives lengths within the document). These inputs are added, all int64:
   slots [Q, M, 2]   (0, token) of the m-th token of row q; any valid index after a row's count
   back [1, S, 2]    (row, m) of each token
   lengths [Q]       entries of each row's cache after this call, in its document (at least 1)
   counts [Q]        tokens of each row in this call
3. A constant total_sequence_length stays: the host of a device does not see the lengths.
4. Caches are [Q, G, C, K]. The runtime chooses Q when it makes them, and C of caches that never evict.

Not a `Rule`: every GroupQueryAttention must be replaced, and one that cannot be is an error.

Requires: attention lowered to GroupQueryAttention. Ensures: weights have the names and file offsets of the original
graph's, so both graphs share one file. The input query_seqlens needs ONNX Runtime 1.32.

Letters: S tokens of the call (P patches in the latent graph), Q rows of the caches, M most tokens of one row,
G key/value heads, C cache slots, K head size.
"""

from __future__ import annotations

import onnx_ir as ir

from blt_runtime.bundle.spec import GraphSpec, TensorSpec, row_spec
from blt_runtime.errors import UsageError

from ..lower.ort import CONTRIB
from ..rewrite import Builder, constant, nodes, replace, required
from . import cleanup

_TOTAL = 6
_PAST, _ROTARY, _OTHERS = slice(3, 5), slice(7, 10), slice(10, None)


def supports(model: ir.Model, spec: GraphSpec) -> bool:
    """Whether the graph has a batched form: all its caches, if it has any, are GroupQueryAttention's."""
    return len(nodes(model, "GroupQueryAttention", CONTRIB)) * 2 == len(spec.aliases)


def run(model: ir.Model, spec: GraphSpec) -> ir.Model:
    """A batched copy of the lowered graph; initializers are shared with `model`. Raises UsageError if there is none."""
    if not supports(model, spec):
        raise UsageError(f"graph {spec.name} has no batched form: its attention is not GroupQueryAttention")
    rows = model.clone()
    wanted = row_spec(spec)
    inputs = {value.name: value for value in rows.graph.inputs}
    added = {t.name: _input(t) for t in wanted.inputs if t.name not in inputs}
    rows.graph.inputs.extend(added.values())
    first = Builder(rows.graph, rows.graph[0])
    slots, back = added["slots"], added["back"]
    attentions = nodes(rows, "GroupQueryAttention", CONTRIB)
    ends, longest = _lengths(first, added["lengths"], slots)
    if attentions and constant(attentions[0].inputs[_TOTAL]) is not None:
        longest = required(attentions[0].inputs[_TOTAL])
    for node in attentions:
        _route(rows.graph, node, slots, back, ends, longest, _int32(first, added["counts"]))
    cleanup.run(rows)
    _order_inputs(rows.graph, wanted)
    return rows


def _input(tensor: TensorSpec) -> ir.Value:
    return ir.Value(name=tensor.name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(list(tensor.shape)))


def _int32(b: Builder, value: ir.Value) -> ir.Value:
    cast: ir.Value = b.op("Cast", value, to=ir.DataType.INT32)
    return cast


def _lengths(b: Builder, lengths_Q: ir.Value, slots_QM2: ir.Value) -> tuple[ir.Value, ir.Value]:
    """seqlens_k [Q] (lengths less one) and total_sequence_length, a bound of all lengths and of M."""
    ends_Q = _int32(b, b.op("Sub", lengths_Q, b.const(1)))
    room = b.op("Squeeze", b.op("Shape", slots_QM2, start=1, end=2))
    return ends_Q, _int32(b, b.op("Max", b.op("ReduceMax", lengths_Q, keepdims=0), room))


def _route(
    graph: ir.Graph, node: ir.Node, slots: ir.Value, back: ir.Value, ends: ir.Value, longest: ir.Value, counts: ir.Value
) -> None:
    if any(value is not None for value in node.inputs[_OTHERS]):
        raise ValueError("an attention with further inputs has no batched form")
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
    """Inputs and caches as the spec lists them. Raises ValueError if a node uses an input that is not in the spec."""
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
