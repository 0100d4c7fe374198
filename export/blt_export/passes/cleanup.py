"""Remove unused nodes and merge equal ones.

Rules
1. Constant nodes become initializers; equal initializers become one.
2. Identity nodes are removed.
3. Equal nodes on equal inputs become one (the mask and the rotary look-ups are computed once a graph this way).
4. Nodes and initializers that no output needs are removed.

Requires: nothing. Ensures: no Constant and no Identity, no unused node, no unused initializer.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

_PASSES = (
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    common.IdentityEliminationPass(),
    common.DeduplicateInitializersPass(size_limit=1024),
    common.CommonSubexpressionEliminationPass(),
    common.RemoveUnusedNodesPass(),
)


def run(model: ir.Model) -> int:
    """Returns how many nodes and initializers fewer there are."""
    before = _size(model)
    for simplify in _PASSES:
        simplify(model)
    return before - _size(model)


def _size(model: ir.Model) -> int:
    return len(model.graph) + len(model.graph.initializers)
