"""Keep attention heads packed, [B, S, H*K], between the projections and GroupQueryAttention.

The model splits heads, [B, H, S, K]; GroupQueryAttention and RotaryEmbedding both take the packed form.

Rules
1. Reshape(Transpose(RotaryEmbedding(x))) that packs the heads of x [B, H, S, K] becomes
   RotaryEmbedding(Reshape(Transpose(x)); num_heads H).
2. Reshape(Transpose(Transpose(Reshape(x)))) that splits the heads of x [B, S, H*K] and packs them again becomes x.

Requires: lowered to GroupQueryAttention, which is where heads are packed. Ensures: nothing else changes.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ..lower.ort import SWAP_HEADS
from ..rewrite import dims, static
from ..rules import MatchResult, Rule, apply


class RotatePacked(Rule):
    """Rule 1."""

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, target: Any) -> Any:
        rotated = op.RotaryEmbedding(x, cos, sin, interleaved=1)
        return op.Reshape(op.Transpose(rotated, perm=SWAP_HEADS), target, _outputs=["out"])

    def check(self, context: Any, x: ir.Value, out: ir.Value, **_: Any) -> MatchResult:
        split, packed = dims(x), dims(out)
        if split is None or packed is None or len(split) != 4 or len(packed) != 3:
            return MatchResult().fail("not [B, H, S, K] packed to [B, S, H*K], as far as the shapes are known")
        return MatchResult()

    def rewrite(self, op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, target: ir.Value, out: ir.Value) -> Any:
        packed = op.Reshape(op.Transpose(x, perm=SWAP_HEADS), target)
        packed.dtype, packed.shape = out.dtype, out.shape
        return op.RotaryEmbedding(packed, cos, sin, interleaved=1, num_heads=static(x, 1))


class StayPacked(Rule):
    """Rule 2."""

    def pattern(self, op: Any, x: Any, split: Any, target: Any) -> Any:
        heads = op.Transpose(op.Reshape(x, split), perm=SWAP_HEADS)
        return op.Reshape(op.Transpose(heads, perm=SWAP_HEADS), target, _outputs=["out"])

    def check(self, context: Any, x: ir.Value, out: ir.Value, **_: Any) -> MatchResult:
        before, after = dims(x), dims(out)
        if before is None or after is None or len(before) != 3 or before != after:
            return MatchResult().fail("not one shape [B, S, H*K] before and after, as far as the shapes are known")
        return MatchResult()

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Identity(x)


def run(model: ir.Model) -> int:
    """Returns how often the rules applied."""
    return apply(model, RotatePacked, StayPacked)
