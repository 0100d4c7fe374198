"""Give the linear caches of GroupQueryAttention a free length.

The operator takes the capacity from its past's shape, so one graph serves caches of every length. A runtime that copies
caches in and out of each call (WebAssembly) begins with short ones and lengthens them as the text needs; results do not
depend on the length. The manifest lists the full capacity, which a runtime that updates caches in place allocates once.

Rules
1. If all caches of a graph are GroupQueryAttention's and linear, dimension 2 of each becomes the letter C.
2. Other graphs keep static caches: a window's cache evicts when it is full, and elsewhere masks are computed from the
   capacity.

The flavour cuda leaves this pass out: its graphs hold the capacity as a constant.

Requires: attention lowered. Ensures: only the shapes of inputs and outputs change.
"""

from __future__ import annotations

import onnx_ir as ir

from blt_runtime.bundle.spec import GraphSpec

from ..rewrite import static
from . import batch_rows

CAPACITY = "C"


def run(model: ir.Model, spec: GraphSpec) -> int:
    """Returns how many inputs and outputs changed."""
    if spec.cache is None or spec.cache.kind != "linear" or not batch_rows.supports(model, spec):
        return 0
    cached = set(spec.aliases) | set(spec.aliases.values())
    changed = [value for value in (*model.graph.inputs, *model.graph.outputs) if value.name in cached]
    for value in changed:
        value.shape = ir.Shape(["B", static(value, 1), CAPACITY, static(value, 3)])
    return len(changed)
