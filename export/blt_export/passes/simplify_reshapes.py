"""Replace computed reshape targets by constants.

The exporter computes targets as Concat(Shape(x), ...): four nodes a layer that do nothing but pass sizes on.

Rules
1. The target of a Reshape with a known output shape becomes a constant: a fixed size stays; a symbolic size that
   stands at the same axis of the input becomes 0 (copy); one other symbolic size becomes -1 (the rest).
2. Two or more such sizes: the rule does not apply, the target stays computed.
3. Sizes that were equal before and after the Reshape: the node goes.
4. Reshape(Reshape(x)) with constant targets becomes one Reshape, unless the outer target copies (0) a size that the
   inner one did not copy from the same place.

Requires: letters unified (name_io). Ensures: `allowzero` is 0 on every Reshape that was changed.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..rewrite import Builder, constant, dims, nodes, replace, required


def run(model: ir.Model) -> int:
    return _make_constant(model) + _merge(model)


def _make_constant(model: ir.Model) -> int:
    changed = 0
    for node in nodes(model, "Reshape"):
        before, after = dims(node.inputs[0]), dims(node.outputs[0])
        if before is None or after is None:
            continue
        if before == after:
            replace(node, [node.inputs[0]])
            changed += 1
            continue
        target = _target(before, after)
        if target is None or constant(node.inputs[1]) is not None:
            continue
        b = Builder(model.graph, node)
        new = b.op("Reshape", required(node.inputs[0]), b.const(target))
        replace(node, [new])
        changed += 1
    return changed


def _target(before: list[int | str], after: list[int | str]) -> list[int] | None:
    target: list[int] = []
    for axis, size in enumerate(after):
        if isinstance(size, int):
            target.append(size)
        elif axis < len(before) and before[axis] == size:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 and 0 not in after else None


def _merge(model: ir.Model) -> int:
    changed = 0
    for node in nodes(model, "Reshape"):
        inner = required(node.inputs[0]).producer()
        if inner is None or inner.op_type != "Reshape":
            continue
        outer_target, inner_target = constant(node.inputs[1]), constant(inner.inputs[1])
        if outer_target is None or inner_target is None or not _merges(outer_target, inner_target):
            continue
        replace(node, [Builder(model.graph, node).op("Reshape", inner.inputs[0], node.inputs[1])])
        changed += 1
    return changed


def _merges(outer: np.ndarray, inner: np.ndarray) -> bool:
    """A size that the outer Reshape copies must be one that the inner one copied from the same place."""
    return all(axis < len(inner) and inner[axis] == 0 for axis in np.flatnonzero(outer == 0))
