"""Store weights as they are multiplied: no Transpose of a constant at run time.

Rules
1. Transpose(initializer) becomes an initializer `<name>.T` with the transposed data. It is computed when the file is
   written (a lazy tensor), so a large weight exists once in memory, not twice. A Transpose that keeps the order of the
   axes is removed.

Requires: nothing. Ensures: no Transpose has a constant input; MatMul weights are stored as [in, out].
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ..rules import MatchResult, Rule, apply


class TransposedWeight(Rule):
    """Rule 1."""

    def setup(self) -> None:
        self._made: dict[str, ir.Value] = {}

    def pattern(self, op: Any, weight: Any) -> Any:
        return op.Transpose(weight, _outputs=["out"])

    def check(self, context: Any, weight: ir.Value, **_: Any) -> MatchResult:
        stored = weight.is_initializer() and weight.const_value is not None
        return MatchResult() if stored else MatchResult().fail("the input is not a weight")

    def rewrite(self, op: Any, weight: ir.Value, out: ir.Value) -> Any:
        source, node = weight.const_value, out.producer()
        assert source is not None and node is not None  # noqa: PT018
        axes = tuple(range(len(source.shape)))
        order = tuple(node.attributes["perm"].as_ints()) if "perm" in node.attributes else axes[::-1]
        if order == axes:
            return op.Identity(weight)
        name = f"{weight.name}.T" if order == (1, 0) else f"{weight.name}.{''.join(map(str, order))}"
        if name not in self._made:
            self._made[name] = op.initializer(_transposed(source, order, name))
        return op.Identity(self._made[name])


def _transposed(source: ir.TensorProtocol, order: tuple[int, ...], name: str) -> ir.LazyTensor:
    def compute() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(source.numpy().transpose(order)), dtype=source.dtype, name=name)

    shape = ir.Shape(np.array(source.shape)[list(order)].tolist())
    return ir.LazyTensor(compute, dtype=source.dtype, shape=shape, name=name)


def run(model: ir.Model) -> int:
    """Returns how many weights were folded."""
    return apply(model, TransposedWeight)
