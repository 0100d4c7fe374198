"""Look up a patch's keys and values once a call, not once a layer.

Each decoder layer takes its slice of the pool, then the rows of the slice. With R patches in the pool, that copies R
rows a layer and costs a chain of small nodes.

Rules
1. Squeeze(Slice(x, i, i+1, axis), axis) becomes Gather(x, i, axis).
2. Gather(Gather(pool, i, axis 1), rows, axis 0) with a constant scalar i becomes
   Gather(Gather(pool, rows, axis 0), i, axis rank(rows)). The inner one is equal in all layers and is computed once
   (cleanup merges it).

Requires: GatherND simplified. Ensures: one look-up in the pool a graph.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ..rewrite import constant, dims, integer
from ..rules import MatchResult, Rule, apply


class GatherOfSlice(Rule):
    """Rule 1."""

    def pattern(self, op: Any, x: Any, start: Any, stop: Any, axis: Any, squeezed: Any) -> Any:
        return op.Squeeze(op.Slice(x, start, stop, axis), squeezed)

    def check(
        self, context: Any, start: ir.Value, stop: ir.Value, axis: ir.Value, squeezed: ir.Value, **_: Any
    ) -> MatchResult:
        first, end, sliced, gone = (constant(value) for value in (start, stop, axis, squeezed))
        if first is None or end is None or sliced is None or gone is None:
            return MatchResult().fail("the slice or the squeezed axis is not constant")
        if first.size != 1 or gone.tolist() != sliced.tolist():
            return MatchResult().fail("other axes are squeezed than sliced")
        if first[0] < 0 or end[0] != first[0] + 1:
            return MatchResult().fail("the slice is not one entry counted from the front")
        return MatchResult()

    def rewrite(self, op: Any, x: ir.Value, start: ir.Value, axis: ir.Value, **_: Any) -> Any:
        return op.Gather(x, op.Constant(value_int=_number(start)), axis=_number(axis))


class RowsBeforeLayer(Rule):
    """Rule 2."""

    def pattern(self, op: Any, pool: Any, layer: Any, rows: Any) -> Any:
        return op.Gather(op.Gather(pool, layer, axis=1), rows, _outputs=["out"])

    def check(self, context: Any, layer: ir.Value, rows: ir.Value, out: ir.Value, **_: Any) -> MatchResult:
        index = constant(layer)
        if integer(out.producer(), "axis"):
            return MatchResult().fail("the outer Gather does not look up rows of axis 0")
        if index is None or index.ndim != 0:
            return MatchResult().fail("the layer is not a constant scalar")
        if not dims(rows):
            return MatchResult().fail("the rank of the rows is not known, or 0")
        return MatchResult()

    def rewrite(self, op: Any, pool: ir.Value, layer: ir.Value, rows: ir.Value, **_: Any) -> Any:
        sizes, of_pool = dims(rows) or [], dims(pool)
        looked_up = op.Gather(pool, rows, axis=0)
        looked_up.dtype = pool.dtype
        looked_up.shape = None if of_pool is None else ir.Shape([*sizes, *of_pool[1:]])
        return op.Gather(looked_up, layer, axis=len(sizes))


def _number(value: ir.Value) -> int:
    array = constant(value)
    assert array is not None
    return int(array[0])


def run(model: ir.Model) -> int:
    """Returns how often the rules applied."""
    return apply(model, GatherOfSlice, RowsBeforeLayer)
