"""Lowerings that both flavours share.

blt.RMSNorm(x, w; eps)  ->  RMSNormalization(x, w; axis -1, epsilon eps)
blt.Rope(x, cos, sin)   ->  RotaryEmbedding(x, cos, sin; interleaved 1)   x [B, H, S, K], cos and sin [B, S, K/2]
"""

from __future__ import annotations

import onnx_ir as ir

from blt_runtime.bundle.spec import GraphSpec

from ..capture.translate import DOMAIN
from ..rewrite import Builder, nodes, replace


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


def check_lowered(model: ir.Model, spec: GraphSpec) -> None:
    """Raises ValueError if a `blt` operator is left, or if a cache is read by a node other than the one that writes it.

    A cache's input and output are one buffer, and nothing orders another reader before or after the write.
    """
    left = [node.op_type for node in model.graph if node.domain == DOMAIN]
    if left:
        raise ValueError(f"operators without a lowering: {', '.join(sorted(set(left)))}")
    model.graph.opset_imports.pop(DOMAIN, None)
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    for output, source in spec.aliases.items():
        writer = values[output].producer()
        readers = [node for node in values[source].consumers() if node is not writer]
        if readers or values[source].is_graph_output():
            reader = readers[0].op_type if readers else "an output"
            raise ValueError(f"{source} is read by {reader}, not only by the node that writes {output}")
