"""Plain Gather where the exporter writes GatherND.

`table[index]` with one index tensor is exported as GatherND(table, Unsqueeze(index, -1)).

Rules
1. GatherND(data, Unsqueeze(index, last axis)) with batch_dims 0 becomes Gather(data, index, axis 0).

Requires: nothing. Ensures: embedding and rotary table look-ups are single nodes.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ..rewrite import constant, dims, integer
from ..rules import MatchResult, Rule, apply


class GatherRows(Rule):
    """Rule 1."""

    def pattern(self, op: Any, data: Any, index: Any, axes: Any) -> Any:
        return op.GatherND(data, op.Unsqueeze(index, axes, _outputs=["entries"]), _outputs=["out"])

    def check(self, context: Any, axes: ir.Value, entries: ir.Value, out: ir.Value, **_: Any) -> MatchResult:
        at, rank = constant(axes), len(dims(entries) or [])
        if integer(out.producer(), "batch_dims"):
            return MatchResult().fail("batch_dims is not 0")
        if at is None or not rank:
            return MatchResult().fail("the axis or the rank of the index is not known at export")
        if (at.reshape(-1) % rank).tolist() != [rank - 1]:
            return MatchResult().fail("the index has entries of more than one axis")
        return MatchResult()

    def rewrite(self, op: Any, data: ir.Value, index: ir.Value, **_: Any) -> Any:
        return op.Gather(data, index, axis=0)


def run(model: ir.Model) -> int:
    """Returns how many look-ups were simplified."""
    return apply(model, GatherRows)
