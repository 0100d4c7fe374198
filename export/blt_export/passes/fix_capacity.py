"""Give the caches their capacity.

Capture does not depend on the capacity, so one capture serves flavours with different caches.

Rules
1. Every aliased input and output gets the shape of its `TensorSpec`, whose sizes besides B are static
   (TensorRT needs a static capacity, and ONNX Runtime can plan the buffers).
2. Rows B stay symbolic.

Requires: names of the spec (name_io). Ensures: cache shapes of the spec.
"""

from __future__ import annotations

import onnx_ir as ir

from blt_runtime.bundle.spec import GraphSpec

from ..rewrite import dims


def run(model: ir.Model, spec: GraphSpec) -> int:
    shapes = {t.name: t.shape for t in (*spec.inputs, *spec.outputs)}
    cached = set(spec.aliases) | set(spec.aliases.values())
    changed = 0
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in cached and dims(value) != list(shapes[value.name]):
            value.shape = ir.Shape(list(shapes[value.name]))
            changed += 1
    return changed
