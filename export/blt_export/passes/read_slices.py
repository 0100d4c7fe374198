"""The decoder's cross-attention over the k slices of a patch as one Attention a layer.

As captured, it is products and sums over [B, S, J, H, K]: a dozen small nodes a layer, whose calls take longer than
their arithmetic. Shape M, one position: the decoder is 8 % faster in two threads, 20 % in one.

Rules
1. ReduceSum(Softmax(ReduceSum(q * k, -1) * scale, 2) * v, 2) with q [B, S, 1, H, K] and k, v [B, S, J, H, K] becomes
   Attention(q, k, v; scale), where q is [B*S, 1, H*K] and k, v are [B*S, J, H*K].
2. k or v that is one entry of layer and one of (key, value), Gather(Gather(x, y, 3), i, 3) of x [B, S, 1, Y, 2, J, D],
   is cut out of x with all others by one Split a graph (cleanup merges the equal ones).
3. The Reshape that splits the heads of q and the one that makes its rows become one. So do the two after the Attention:
   Reshape(Reshape(y, Shape(Reshape(x, heads))), [0, 0, D]) becomes Reshape(y, Shape(x)).

Requires: gather_once, clean. Ensures: nothing else changes; a visibility mask (more than one patch a byte) prevents
rule 1.

Letters: B rows, S positions, J slices, H heads, K head size, D = H*K, Y layers.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ..rewrite import constant, dims, static
from ..rules import MatchResult, Rule, apply
from .simplify_reshapes import MergeReshapes

_SLICES, _LAYERS = 2, 3
"""Axes of J in the captured values, and of Y (then of key and value) in the pool."""


class AttendToSlices(Rule):
    """Rule 1."""

    def __init__(self) -> None:
        super().__init__()
        self.remove_nodes = True  # shares that another node reads would have to be computed twice

    def setup(self) -> None:
        self._shapes: dict[int, ir.Value] = {}

    def pattern(
        self, op: Any, q: Any, k: Any, v: Any, scale: Any, new_axis: Any, size_axis: Any, share_axis: Any,
        slice_axis: Any,
    ) -> Any:  # fmt: skip
        product = op.Mul(op.Unsqueeze(q, new_axis), k, _outputs=["product"])
        score = op.Mul(op.ReduceSum(product, size_axis, keepdims=0), scale)
        share = op.Softmax(score, axis=_SLICES)
        weighted = op.Mul(op.Unsqueeze(share, share_axis), v, _outputs=["weighted"])
        return op.ReduceSum(weighted, slice_axis, keepdims=0)

    def check(
        self, context: Any, k: ir.Value, v: ir.Value, scale: ir.Value, new_axis: ir.Value, size_axis: ir.Value,
        share_axis: ir.Value, slice_axis: ir.Value, product: ir.Value, weighted: ir.Value, **_: Any,
    ) -> MatchResult:  # fmt: skip
        factor = constant(scale)
        if factor is None or factor.size != 1:
            return MatchResult().fail("the scale is not one constant")
        if len(dims(k) or []) != 5 or len(dims(v) or []) != 5:
            return MatchResult().fail("keys or values are not [B, S, J, H, K]")
        if _axis(new_axis, 5) != _SLICES or _axis(size_axis, len(dims(product) or [])) != 4:
            return MatchResult().fail("queries and keys are not multiplied over the head size")
        if _axis(share_axis, 5) != 4 or _axis(slice_axis, len(dims(weighted) or [])) != _SLICES:
            return MatchResult().fail("the weighted values are not summed over the slices")
        return MatchResult()

    def rewrite(self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, scale: ir.Value, **_: Any) -> Any:
        slices, heads, size = (static(k, axis) for axis in (2, 3, 4))
        rows = [op.Reshape(x, op.Constant(value_ints=[-1, slices, heads * size])) for x in (k, v)]
        query = op.Reshape(q, op.Constant(value_ints=[-1, 1, heads * size]))
        factor = constant(scale)
        assert factor is not None
        out = op.Attention(query, *rows, q_num_heads=heads, kv_num_heads=heads, scale=float(factor.reshape(-1)[0]))
        if size not in self._shapes:  # all layers' queries have one shape
            self._shapes[size] = op.Shape(q)
        return op.Reshape(out, self._shapes[size])


class CutEntries(Rule):
    """Rule 2."""

    def pattern(self, op: Any, pool: Any, layer: Any, kind: Any, heads: Any, rows: Any) -> Any:
        entry = op.Gather(op.Gather(pool, layer, axis=_LAYERS), kind, axis=_LAYERS)
        return op.Reshape(op.Reshape(entry, heads), rows)

    def check(self, context: Any, pool: ir.Value, layer: ir.Value, kind: ir.Value, **_: Any) -> MatchResult:
        shape = dims(pool)
        if shape is None or len(shape) != 7 or shape[2] != 1:
            return MatchResult().fail("the pool is not [B, S, 1, Y, 2, J, D]")
        if any(index is None or index.ndim for index in (constant(layer), constant(kind))):
            return MatchResult().fail("the layer or the choice of key and value is not a constant scalar")
        return MatchResult()

    def rewrite(self, op: Any, pool: ir.Value, layer: ir.Value, kind: ir.Value, **_: Any) -> Any:
        layers, kinds, slices, width = (static(pool, axis) for axis in range(_LAYERS, 7))
        count = layers * kinds
        rows = op.Reshape(pool, op.Constant(value_ints=[-1, count * slices, width]))
        entries = op.Split(rows, op.Constant(value_ints=[slices] * count), _outputs=count, axis=1)
        return entries[_index(layer) * kinds + _index(kind)]


class KeepRows(Rule):
    """Rule 3, after the Attention. The queries of all layers have one shape: that of the first is read."""

    def setup(self) -> None:
        self._shapes: dict[int, ir.Value] = {}

    def pattern(self, op: Any, y: Any, x: Any, heads: Any, target: Any) -> Any:
        return op.Reshape(op.Reshape(y, op.Shape(op.Reshape(x, heads))), target, _outputs=["out"])

    def check(self, context: Any, x: ir.Value, target: ir.Value, out: ir.Value, **_: Any) -> MatchResult:
        before, sizes = dims(x), constant(target)
        if before is None or len(before) != 3 or sizes is None or sizes.tolist() != [0, 0, before[-1]]:
            return MatchResult().fail("not split into heads and joined again, as far as the shapes are known")
        return MatchResult()

    def rewrite(self, op: Any, y: ir.Value, x: ir.Value, out: ir.Value, **_: Any) -> Any:
        width = static(x, -1)
        if width not in self._shapes:
            self._shapes[width] = op.Shape(x)
        rows = op.Reshape(y, self._shapes[width])
        rows.dtype, rows.shape = out.dtype, out.shape
        return rows


def _axis(value: ir.Value, rank: int) -> int | None:
    """The one axis that a constant names; None if it is not constant, not one, or the rank is not known (0)."""
    axes = constant(value)
    return int(axes.reshape(-1)[0]) % rank if axes is not None and axes.size == 1 and rank else None


def _index(value: ir.Value) -> int:
    index = constant(value)
    assert index is not None
    return int(index)


def run(model: ir.Model) -> int:
    """Returns how many attentions there are now."""
    attentions = apply(model, AttendToSlices)
    if attentions:
        apply(model, CutEntries, KeepRows, MergeReshapes)
    return attentions
