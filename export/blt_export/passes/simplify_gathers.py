"""Plain Gather where the exporter writes GatherND.

`table[index]` with one index tensor is exported as GatherND(table, Unsqueeze(index, -1)).

Rules
1. GatherND(data, Unsqueeze(index, last axis)) with batch_dims 0 becomes Gather(data, index, axis 0).

Requires: nothing. Ensures: embedding and rotary table look-ups are single nodes.
"""

from __future__ import annotations

import onnx_ir as ir

from ..rewrite import Builder, constant, dims, nodes, replace


def run(model: ir.Model) -> int:
    changed = 0
    for node in nodes(model, "GatherND"):
        index = _unsqueezed(node)
        if index is None:
            continue
        replace(node, [Builder(model.graph, node).op("Gather", node.inputs[0], index, axis=0)])
        changed += 1
    return changed


def _unsqueezed(node: ir.Node) -> ir.Value | None:
    """The index tensor, if the GatherND reads it one row at a time."""
    batch_dims = node.attributes["batch_dims"].as_int() if "batch_dims" in node.attributes else 0
    index = node.inputs[1]
    producer = None if index is None else index.producer()
    if batch_dims or producer is None or producer.op_type != "Unsqueeze":
        return None
    axes, rank = constant(producer.inputs[1]), len(dims(index) or [])
    if axes is None or rank == 0 or [int(a) % rank for a in axes.reshape(-1)] != [rank - 1]:
        return None
    return producer.inputs[0]
