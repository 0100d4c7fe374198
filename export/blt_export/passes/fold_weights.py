"""Store weights as they are multiplied: no Transpose of a constant at run time.

Rules
1. Transpose(initializer) becomes an initializer `<name>.T` with the transposed data. It is computed when the file is
   written (a lazy tensor), so a large weight exists once in memory, not twice.
2. A Transpose that keeps the order of the axes goes.

Requires: nothing. Ensures: no Transpose has a constant input; MatMul weights lie as [in, out].
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..rewrite import nodes, swap


def run(model: ir.Model) -> int:
    changed = 0
    for node in nodes(model, "Transpose"):
        weight = node.inputs[0]
        if weight is None or not weight.is_initializer() or weight.const_value is None:
            continue
        rank = len(weight.const_value.shape)
        order = tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else tuple(range(rank))[::-1]
        swap(node.outputs[0], weight if order == tuple(range(rank)) else _transposed(model.graph, weight, order))
        model.graph.remove(node, safe=True)
        changed += 1
    return changed


def _transposed(graph: ir.Graph, weight: ir.Value, order: tuple[int, ...]) -> ir.Value:
    source = weight.const_value
    assert source is not None
    shape = ir.Shape(np.array(source.shape)[list(order)].tolist())
    name = f"{weight.name}.T" if order == (1, 0) else f"{weight.name}.{''.join(map(str, order))}"
    if name in graph.initializers:
        return graph.initializers[name]

    def compute() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(source.numpy().transpose(order)), dtype=source.dtype, name=name)

    lazy = ir.LazyTensor(compute, dtype=source.dtype, shape=shape, name=name)
    value = ir.Value(name=name, type=ir.TensorType(source.dtype), shape=shape, const_value=lazy)
    graph.register_initializer(value)
    return value
