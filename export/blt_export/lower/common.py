"""Lowerings that both flavours share.

blt.RMSNorm(x, w; eps)  ->  RMSNormalization(x, w; axis -1, epsilon eps)
blt.Rope(x, cos, sin)   ->  RotaryEmbedding(x, cos, sin; interleaved 1)   x [B, H, S, K], cos and sin [B, S, K/2]
"""

from __future__ import annotations

import onnx_ir as ir

from ..rewrite import Builder, nodes, replace
from ..translate import DOMAIN


def lower_norms(model: ir.Model) -> int:
    found = nodes(model, "RMSNorm", DOMAIN)
    for node in found:
        x, weight = node.inputs
        eps = node.attributes["eps"].as_float()
        new = Builder(model.graph, node).op("RMSNormalization", x, weight, axis=-1, epsilon=eps)
        replace(node, [new])
    return len(found)


def lower_ropes(model: ir.Model) -> int:
    found = nodes(model, "Rope", DOMAIN)
    for node in found:
        x, cos, sin = node.inputs
        new = Builder(model.graph, node).op("RotaryEmbedding", x, cos, sin, interleaved=1)
        replace(node, [new])
    return len(found)


def check_lowered(model: ir.Model) -> None:
    """No `blt` operator is left."""
    left = [node.op_type for node in model.graph if node.domain == DOMAIN]
    if left:
        raise ValueError(f"operators without a lowering: {', '.join(sorted(set(left)))}")
    model.graph.opset_imports.pop(DOMAIN, None)
