"""Compute at export what does not depend on the input.

Rules
1. onnxscript's optimiser: nodes on constants become constants, shape arithmetic on known sizes becomes constants,
   Reshape, Expand, Slice and Cast that change nothing are removed.
2. Only small constants are computed (4 KiB in, 64 KiB out): weights stay as they are, or memory would hold them twice.

Requires: weights folded (fold_weights). Ensures: no Constant and no shape arithmetic on static sizes.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer


def run(model: ir.Model) -> int:
    """Returns how many nodes fewer there are."""
    before = len(model.graph)
    optimizer.optimize_ir(model, input_size_limit=4096, output_size_limit=65536)
    return before - len(model.graph)
