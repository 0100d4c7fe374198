"""The doubling before the decoder's cross-attention, folded into weights.

A cross-attention layer returns 2 * h + cross(norm(h)), because the published model adds its input twice (spec section
2). That is a node a layer. Instead the stream of sums is kept at a fraction of its size, u = h / 2^n, where n is the
number of doublings so far: 2 * h + c = 2^(n + 1) * (u + c / 2^(n + 1)).

Rules, where u = x / 2^n
1. Add(Mul(x, 2), c) becomes Add(u, c / 2^(n + 1)), a value that is smaller by 2^(n + 1).
2. Add(x, c) becomes Add(u, c / 2^n).
3. RMSNormalization(x, w; eps) becomes RMSNormalization(u, w; eps / 4^n), which has the same value.
4. c is MatMul(y, W) with a constant matrix: the matrix becomes W / 2^n. It is computed when it is read (a lazy tensor).

Powers of two only change exponents, so every float32 result keeps its bits, and 8- and 4-bit codes stay the same: their
scales are divided instead. In half precision small weights would lose bits: the pass is left out there.

All of a graph's doublings are folded or none: a stream that another operator reads, or that is an output, stays.

Requires: norms lowered, weights folded ([in, out]). Ensures: no Mul by 2 before an Add, or the graph is unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ..rewrite import constant, lazy_initializer, nodes, required
from ..rules import Skipped

SMALLEST = float(np.finfo(np.float32).tiny)


class _Refused(Exception):
    """Why the doublings of a graph stay; the node is the first at fault."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


@dataclass
class _Plan:
    """What to change, found before anything is."""

    halvings: dict[ir.Value, int] = field(default_factory=dict)
    """n of each value that is kept at 1 / 2^n of its size."""
    doublings: dict[ir.Node, ir.Value] = field(default_factory=dict)
    """Each Mul by 2, and the value that it doubles."""
    norms: dict[ir.Node, int] = field(default_factory=dict)
    products: dict[ir.Node, int] = field(default_factory=dict)


def run(model: ir.Model) -> int:
    """Returns how many doublings were folded."""
    skipped = Skipped("FoldDoubling")
    try:
        plan = _plan(model)
    except _Refused as refused:
        skipped.add(refused.node, refused.reason)
        skipped.log(model)
        return 0
    for norm, n in plan.norms.items():
        epsilon = norm.attributes["epsilon"].as_float()
        norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon / 4**n)
    for product, n in plan.products.items():
        product.replace_input_with(1, _scaled(model.graph, required(product.inputs[1]), n))
    for mul, x in plan.doublings.items():
        ir.convenience.replace_all_uses_with(mul.outputs[0], x)
        model.graph.remove(mul, safe=True)
    return len(plan.doublings)


def _plan(model: ir.Model) -> _Plan:
    plan = _Plan()
    for mul in nodes(model, "Mul"):
        if (x := _doubled(mul)) is not None:
            plan.doublings[mul] = x
    for node in model.graph:
        if node in plan.doublings:
            _check_doubling(node)
        elif node.op_type == "Add":
            _add(plan, node)
        elif any(value in plan.halvings for value in node.inputs if value is not None):
            _read(plan, node)
    for value in plan.halvings:
        if value.is_graph_output():
            raise _Refused(_producer(value), "an output of the graph would change")
    return plan


def _doubled(mul: ir.Node) -> ir.Value | None:
    """x of Mul(x, 2) or Mul(2, x)."""
    a, b = (required(value) for value in mul.inputs)
    for x, factor in ((a, b), (b, a)):
        array = constant(factor)
        if array is not None and array.size == 1 and array.reshape(-1)[0] == 2:
            return x
    return None


def _check_doubling(mul: ir.Node) -> None:
    readers = list(mul.outputs[0].consumers())
    if len(readers) != 1 or readers[0].op_type != "Add":
        raise _Refused(mul, "the doubled value is not only an addend")


def _add(plan: _Plan, node: ir.Node) -> None:
    """Plan an Add: of its two terms, one is the stream and the other a product."""
    terms = [required(value) for value in node.inputs]
    counts = [_halvings(plan, value) for value in terms]
    n = max(counts)
    if not n:
        return
    if min(counts):
        raise _Refused(node, "both terms are doubled")
    product = terms[counts.index(0)].producer()
    if product is None or product.op_type != "MatMul" or len(list(product.outputs[0].consumers())) != 1:
        raise _Refused(node, "the other term is no product that only this sum reads")
    weight = required(product.inputs[1])
    if not weight.is_initializer() or weight.const_value is None or weight.dtype is not ir.DataType.FLOAT:
        raise _Refused(product, "the right side is not a constant float32 matrix")
    plan.products[product] = plan.halvings[node.outputs[0]] = n


def _halvings(plan: _Plan, value: ir.Value) -> int:
    mul = value.producer()
    if mul is not None and mul in plan.doublings:
        return plan.halvings.get(plan.doublings[mul], 0) + 1
    return plan.halvings.get(value, 0)


def _read(plan: _Plan, node: ir.Node) -> None:
    n = plan.halvings.get(required(node.inputs[0]), 0)
    if node.op_type != "RMSNormalization" or not n:
        raise _Refused(node, f"{node.op_type} reads a sum that would change")
    if node.attributes["epsilon"].as_float() / 4**n < SMALLEST:
        raise _Refused(node, f"{n} doublings leave nothing of the norm's epsilon")
    plan.norms[node] = n


def _scaled(graph: ir.Graph, weight: ir.Value, n: int) -> ir.Value:
    tensor = weight.const_value
    assert tensor is not None
    factor = np.float32(0.5**n)
    name, sizes = f"{factor}*{weight.name}", tensor.shape.numpy()
    return lazy_initializer(graph, name, tensor.dtype, sizes, lambda: tensor.numpy() * factor)


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node
