"""Store weights as they are multiplied: no Transpose of a constant at run time.

Rules
1. Transpose(initializer) becomes an initializer with the transposed data. It is computed when the file is written
   (a lazy tensor), so a large weight exists once in memory, not twice.

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
        perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
        folded = _transposed(weight, perm)
        model.graph.register_initializer(folded)
        swap(node.outputs[0], folded)
        model.graph.remove(node, safe=True)
        changed += 1
    return changed


def _transposed(weight: ir.Value, perm: tuple[int, ...] | list[int] | None) -> ir.Value:
    source = weight.const_value
    assert source is not None
    order = tuple(perm) if perm is not None else tuple(reversed(range(len(source.shape))))
    shape = ir.Shape([source.shape[axis] for axis in order])
    name = f"{weight.name}.T"

    def compute() -> ir.Tensor:
        return ir.Tensor(np.ascontiguousarray(source.numpy().transpose(order)), dtype=source.dtype, name=name)

    lazy = ir.LazyTensor(compute, dtype=source.dtype, shape=shape, name=name)
    return ir.Value(name=name, type=ir.TensorType(source.dtype), shape=shape, const_value=lazy)
