"""Rotary embedding inside GroupQueryAttention, and queries, keys and values as one packed input.

The numbers are the same to the last bit, with two or three nodes fewer a layer: 2 to 3 % of a graph's time for one
position (shape M, two threads, float32 and 8 bits).

Rules
1. GroupQueryAttention(RotaryEmbedding(q, cos[p], sin[p]), RotaryEmbedding(k, cos[p], sin[p]), v, ...) with do_rotary 0
   becomes GroupQueryAttention(q, k, v, ..., cos, sin, position_ids p) with do_rotary 1.
2. Then q, k, v that are all outputs of one Split, in order, become its input (the packed form).

The operator rotates heads whose size is a multiple of 16; others stay as they are. Positions continue across documents
while the cache starts over, so `position_ids` is always given. In a call that starts all caches and has no
`query_seqlens`, the operator reads only the first row's first position: such a graph must be called with one row.

Requires: lowered, heads packed. Ensures: nothing else changes.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from ..lower.ort import CONTRIB
from ..rewrite import static
from ..rules import MatchResult, Rule, apply

HEADS_OF = 16


class RotateInside(Rule):
    """Rule 1."""

    def pattern(
        self, op: Any, q: Any, k: Any, v: Any, past_key: Any, past_value: Any, ends: Any, longest: Any, cos: Any,
        sin: Any, positions: Any,
    ) -> Any:  # fmt: skip
        def rotated(x: Any) -> Any:
            return op.RotaryEmbedding(x, op.Gather(cos, positions), op.Gather(sin, positions), interleaved=1)

        return op.GroupQueryAttention(
            *(rotated(q), rotated(k), v, past_key, past_value, ends, longest),
            _domain=CONTRIB,
            _outputs=["out", "key", "value"],
        )

    def check(self, context: Any, past_key: ir.Value, **_: Any) -> MatchResult:
        size = static(past_key, 3)
        return MatchResult().fail(f"heads of {size}, no multiple of {HEADS_OF}") if size % HEADS_OF else MatchResult()

    def rewrite(
        self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, past_key: ir.Value, past_value: ir.Value, ends: ir.Value,
        longest: ir.Value, cos: ir.Value, sin: ir.Value, positions: ir.Value, out: ir.Value, **_: Any,
    ) -> Any:  # fmt: skip
        node = out.producer()
        assert node is not None
        options = {name: value.as_int() for name, value in node.attributes.items() if name != "do_rotary"}
        inputs = (q, k, v, past_key, past_value, ends, longest, cos, sin, positions)
        rotary = {"do_rotary": 1, "rotary_interleaved": 1}
        return op.GroupQueryAttention(*inputs, _domain=CONTRIB, _outputs=3, **rotary, **options)


class PackProjections(Rule):
    """Rule 2."""

    def pattern(
        self, op: Any, x: Any, sizes: Any, past_key: Any, past_value: Any, ends: Any, longest: Any, cos: Any, sin: Any,
        positions: Any,
    ) -> Any:  # fmt: skip
        q, k, v = op.Split(x, sizes, _outputs=["q", "k", "v"])
        return op.GroupQueryAttention(
            *(q, k, v, past_key, past_value, ends, longest, cos, sin, positions),
            do_rotary=1,
            _domain=CONTRIB,
            _outputs=["out", "key", "value"],
        )

    def check(self, context: Any, q: ir.Value, **_: Any) -> MatchResult:
        split = q.producer()
        parts = 0 if split is None else len(split.outputs)
        return MatchResult() if parts == 3 else MatchResult().fail(f"the Split has {parts} outputs, not 3")

    def rewrite(
        self, op: Any, x: ir.Value, past_key: ir.Value, past_value: ir.Value, ends: ir.Value, longest: ir.Value,
        cos: ir.Value, sin: ir.Value, positions: ir.Value, out: ir.Value, **_: Any,
    ) -> Any:  # fmt: skip
        node = out.producer()
        assert node is not None
        options = {name: value.as_int() for name, value in node.attributes.items()}
        inputs = (x, None, None, past_key, past_value, ends, longest, cos, sin, positions)
        return op.GroupQueryAttention(*inputs, _domain=CONTRIB, _outputs=3, **options)


def run(model: ir.Model) -> int:
    """Returns how many attentions rotate inside."""
    rotated = apply(model, RotateInside)
    apply(model, PackProjections)
    return rotated
