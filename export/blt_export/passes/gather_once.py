"""Read a patch's keys and values once a call, not once a layer.

The decoder's layers each take their slice of the pool and then the rows of it: with R patches in the pool that copies
R rows a layer, and costs a chain of small nodes.

Rules
1. Squeeze(Slice(x, i, i+1, axis), axis) becomes Gather(x, i, axis).
2. Gather(Gather(pool, i, axis 1), rows, axis 0) with a constant scalar i becomes
   Gather(Gather(pool, rows, axis 0), i, axis rank(rows)): the inner one is equal in all layers and is computed once
   (cleanup merges it).

Requires: GatherND simplified. Ensures: one look-up in the pool a graph.
"""

from __future__ import annotations

import onnx_ir as ir

from ..rewrite import Builder, constant, dims, nodes, replace, required


def run(model: ir.Model) -> int:
    return _slices(model) + _rows_first(model)


def _slices(model: ir.Model) -> int:
    changed = 0
    for node in nodes(model, "Squeeze"):
        cut = required(node.inputs[0]).producer()
        if cut is None or cut.op_type != "Slice" or len(cut.inputs) != 4:
            continue
        start, stop, axis = (constant(value) for value in cut.inputs[1:])
        squeezed = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if start is None or stop is None or axis is None or squeezed is None or start.size != 1:
            continue
        if stop[0] != start[0] + 1 or start[0] < 0 or squeezed.tolist() != axis.tolist():
            continue
        b = Builder(model.graph, node)
        replace(node, [b.op("Gather", cut.inputs[0], b.const(int(start[0])), axis=int(axis[0]))])
        changed += 1
    return changed


def _rows_first(model: ir.Model) -> int:
    changed = 0
    for node in nodes(model, "Gather"):
        layer = required(node.inputs[0]).producer()
        if layer is None or layer.op_type != "Gather" or _axis(node) != 0 or _axis(layer) != 1:
            continue
        index, rows = constant(layer.inputs[1]), required(node.inputs[1])
        pool, rank = required(layer.inputs[0]), len(dims(rows) or [])
        if index is None or index.ndim != 0 or rank == 0:
            continue
        b = Builder(model.graph, node)
        shape = [*(dims(rows) or []), *(dims(pool) or [])[1:]] if dims(pool) else None
        taken = b.op("Gather", pool, rows, axis=0, dtype=pool.dtype, shape=shape)
        replace(node, [b.op("Gather", taken, layer.inputs[1], axis=rank)])
        changed += 1
    return changed


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 0
