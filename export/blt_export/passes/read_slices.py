"""The decoder's cross-attention over the k slices of a patch as one Attention a layer.

Captured it is products and sums over [B, S, J, H, K], a dozen small nodes a layer, whose calls take longer than their
arithmetic. Shape M, one position: the decoder is 8 % faster in two threads, 20 % in one.

Rules
1. ReduceSum(Softmax(ReduceSum(q * k, -1) * scale, 2) * v, 2) with q [B, S, 1, H, K] and k, v [B, S, J, H, K] becomes
   Attention(q, k, v; scale), where q is [B*S, 1, H*K] and k, v are [B*S, J, H*K].
2. k or v that is one entry of layer and one of (key, value), Gather(Gather(x, y, 3), i, 3) of x [B, S, 1, Y, 2, J, D],
   is cut out of x with all others by one Split a graph.

Requires: gather_once, clean. Ensures: nothing else changes; a visibility mask (more than one patch a byte) prevents
rule 1.

Letters: B rows, S positions, J slices, H heads, K head size, D = H*K, Y layers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..rewrite import Builder, constant, dims, nodes, replace, required, static

_LAYER_AXIS = 3


def run(model: ir.Model) -> int:
    """Returns how many attentions there are now."""
    rewriter = _Rewriter(model.graph)
    return sum(rewriter.rewrite(node) for node in nodes(model, "Softmax"))


class _Rewriter:
    """What layers share: the cut keys and values, and the shape that outputs go back to."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._cut: dict[ir.Value, tuple[ir.Value, ...]] = {}
        self._shape: dict[int, ir.Value] = {}

    def rewrite(self, softmax: ir.Node) -> bool:
        found = _match(softmax)
        if found is None:
            return False
        last, q_BSHK, k_BSJHK, v_BSJHK, scale = found
        slices, heads, size = (static(k_BSJHK, axis) for axis in (2, 3, 4))
        b = Builder(self._graph, last)
        k, v = (self._keys(b, value, slices, heads * size) for value in (k_BSJHK, v_BSJHK))
        q = b.op("Reshape", q_BSHK, b.const([-1, 1, heads * size]))
        out = b.op("Attention", q, k, v, q_num_heads=heads, kv_num_heads=heads, scale=scale)
        if size not in self._shape:
            self._shape[size] = b.op("Shape", q_BSHK)
        replace(last, [b.op("Reshape", out, self._shape[size])])
        return True

    def _keys(self, b: Builder, value_BSJHK: ir.Value, slices: int, width: int) -> ir.Value:
        """[B*S, J, D]"""
        entry = _entry(value_BSJHK)
        if entry is None:
            rows: ir.Value = b.op("Reshape", value_BSJHK, b.const([-1, slices, width]))
            return rows
        pool, index, count = entry
        if pool not in self._cut:
            flat = b.op("Reshape", pool, b.const([-1, count * slices, width]))
            self._cut[pool] = b.op("Split", flat, b.const([slices] * count), outputs=count, axis=1)
        return self._cut[pool][index]


def _match(softmax: ir.Node) -> tuple[ir.Node, ir.Value, ir.Value, ir.Value, float] | None:
    """The last node, q [B, S, H, K], k, v [B, S, J, H, K] and the scale; None where the rule does not apply."""
    if softmax.attributes["axis"].as_int() != 2:
        return None
    scaled = _operands(softmax.inputs[0])
    scale = None if scaled is None else constant(scaled[1])
    summed = None if scaled is None or scale is None or scale.size != 1 else _summed(scaled[0], 4)
    product = _operands(summed)
    q = None if product is None else _unsqueezed(product[0], 2)
    if product is None or scale is None or q is None or len(dims(product[1]) or []) != 5:
        return None
    weighted = _only(_only(softmax.outputs[0], "Unsqueeze"), "Mul")
    total = _only(weighted, "ReduceSum")
    node = None if total is None else total.producer()
    values = _operands(weighted)
    if node is None or values is None or _summed(total, 2) is not weighted or len(dims(values[1]) or []) != 5:
        return None
    return node, q, product[1], values[1], float(np.asarray(scale).reshape(-1)[0])


def _operands(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    node = None if value is None else value.producer()
    return (required(node.inputs[0]), required(node.inputs[1])) if node is not None and node.op_type == "Mul" else None


def _summed(value: ir.Value | None, axis: int) -> ir.Value | None:
    """What is summed over one axis, which goes."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "ReduceSum" or node.attributes["keepdims"].as_int():
        return None
    axes, rank = constant(node.inputs[1]), len(dims(node.inputs[0]) or [])
    return node.inputs[0] if axes is not None and rank and (axes % rank).tolist() == [axis] else None


def _unsqueezed(value: ir.Value, axis: int) -> ir.Value | None:
    node = value.producer()
    axes = constant(node.inputs[1]) if node is not None and node.op_type == "Unsqueeze" else None
    return node.inputs[0] if node is not None and axes is not None and axes.tolist() == [axis] else None


def _only(value: ir.Value | None, op_type: str) -> ir.Value | None:
    """The output of the only user of a value."""
    users = [] if value is None else list(value.consumers())
    return users[0].outputs[0] if len(users) == 1 and users[0].op_type == op_type else None


def _entry(value: ir.Value) -> tuple[ir.Value, int, int] | None:
    """Rule 2: x, which of its Y * 2 entries, and their number."""
    reshape = value.producer()
    inner = None if reshape is None or reshape.op_type != "Reshape" else _picked(reshape.inputs[0])
    outer = None if inner is None else _picked(inner[0])
    shape = None if outer is None else dims(outer[0])
    if inner is None or outer is None or shape is None or len(shape) != 7 or shape[2] != 1:
        return None
    layers, kinds = static(outer[0], 3), static(outer[0], 4)
    return outer[0], outer[1] * kinds + inner[1], layers * kinds


def _picked(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Gather" or node.attributes["axis"].as_int() != _LAYER_AXIS:
        return None
    index = constant(node.inputs[1])
    return (required(node.inputs[0]), int(index)) if index is not None and index.ndim == 0 else None
