"""Replace computed reshape targets by constants.

The exporter computes targets as Concat(Shape(x), ...): four nodes a layer that only pass sizes on.

Rules
1. A Reshape whose output has the sizes of its input is removed.
2. The target of a Reshape with a known output shape becomes a constant: a fixed size stays; a symbolic size that is at
   the same axis of the input becomes 0 (copy); one other symbolic size becomes -1 (the rest). With two or more such
   sizes the target stays computed.
3. Reshape(Reshape(x)) with constant targets becomes one Reshape, unless the outer target copies (0) a size that the
   inner one did not copy from the same axis.

Requires: letters unified (name_io). Ensures: `allowzero` is 0 on every Reshape that was changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ..rewrite import Dim, constant, dims
from ..rules import MatchResult, Rule, apply


class DropReshape(Rule):
    """Rule 1."""

    def pattern(self, op: Any, x: Any, target: Any) -> Any:
        return op.Reshape(x, target, _outputs=["out"])

    def check(self, context: Any, x: ir.Value, out: ir.Value, **_: Any) -> MatchResult:
        before, after = dims(x), dims(out)
        if before is None or after is None:
            return MatchResult().fail("the shape of the input or the output is not known")
        return MatchResult() if before == after else MatchResult().fail("the shape changes")

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Identity(x)


class ConstantTarget(Rule):
    """Rule 2."""

    def pattern(self, op: Any, x: Any, target: Any) -> Any:
        return op.Reshape(x, target, _outputs=["out"])

    def check(self, context: Any, x: ir.Value, target: ir.Value, out: ir.Value) -> MatchResult:
        before, after = dims(x), dims(out)
        if constant(target) is not None:
            return MatchResult().fail("the target is constant already")
        if before is None or after is None:
            return MatchResult().fail("the shape of the input or the output is not known")
        if _target(before, after) is None:
            return MatchResult().fail("two sizes of the output are neither fixed nor copied")
        return MatchResult()

    def rewrite(self, op: Any, x: ir.Value, out: ir.Value, **_: Any) -> Any:
        return op.Reshape(x, op.Constant(value_ints=_target(dims(x) or [], dims(out) or [])))


class MergeReshapes(Rule):
    """Rule 3."""

    def pattern(self, op: Any, x: Any, inner: Any, outer: Any) -> Any:
        return op.Reshape(op.Reshape(x, inner), outer)

    def check(self, context: Any, inner: ir.Value, outer: ir.Value, **_: Any) -> MatchResult:
        first, last = constant(inner), constant(outer)
        if first is None or last is None:
            return MatchResult().fail("a target is not constant")
        if any(axis >= len(first) or first[axis] for axis in np.flatnonzero(last == 0)):
            return MatchResult().fail("the outer target copies a size that the inner one changes")
        return MatchResult()

    def rewrite(self, op: Any, x: ir.Value, outer: ir.Value, **_: Any) -> Any:
        return op.Reshape(x, outer)


def _target(before: list[Dim], after: list[Dim]) -> list[int] | None:
    target: list[int] = []
    for axis, size in enumerate(after):
        if isinstance(size, int):
            target.append(size)
        elif axis < len(before) and before[axis] == size:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 and 0 not in after else None


def run(model: ir.Model) -> int:
    """Returns how often the rules applied."""
    return apply(model, DropReshape, ConstantTarget, MergeReshapes)
