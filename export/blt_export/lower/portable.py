"""Portable lowering: operators of opset 24 only; ONNX Runtime and TensorRT run the same graph.

blt.CachedAttention becomes
1. TensorScatter(cache, new, write index; linear, axis -2) for keys and values. Slot of position p: p mod C.
   A call never wraps (the host cuts chunks at multiples of C), so a linear write from the first slot is enough;
   TensorRT has no circular one.
2. Attention(q, cache k, cache v, mask), 4-D, with an explicit boolean mask. ONNX Runtime or TensorRT refuse, ignore or
   interpret differently the inputs that would make it unnecessary (past_key, nonpad_kv_seqlen, is_causal).

The mask is computed from the position that each slot holds, last - (last - slot) mod C, negative if never written:
a slot is visible iff max(doc_start, t - window + 1) <= its position <= t. It is computed once per graph: equal
(positions, doc_start, capacity, window) share the nodes.

Letters: B rows, S positions of this call, C slots, G key/value heads, K head size.
"""

from __future__ import annotations

import onnx_ir as ir

from blt_runtime.bundle.spec import GraphSpec

from ..capture.translate import DOMAIN
from ..rewrite import Builder, nodes, replace, required, static
from .common import check_lowered, lower_norms, lower_ropes


def lower(model: ir.Model, spec: GraphSpec) -> int:
    """Replace every `blt` operator; returns how many. Rings and linear caches are addressed the same way."""
    shared: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}
    attentions = nodes(model, "CachedAttention", DOMAIN)
    for node in attentions:
        _lower_attention(model.graph, node, shared, attentions[0])
    count = len(attentions) + lower_norms(model) + lower_ropes(model)
    check_lowered(model, spec)
    return count


def _lower_attention(
    graph: ir.Graph, node: ir.Node, shared: dict[tuple[object, ...], tuple[ir.Value, ir.Value]], first: ir.Node
) -> None:
    q, k, v, past_key, past_value, positions, doc_start = (required(value) for value in node.inputs)
    capacity, window = static(past_key, 2), node.attributes["window"].as_int()
    key = (positions.name, doc_start.name, capacity, window)
    if key not in shared:
        shared[key] = _slot_and_mask(Builder(graph, first), positions, doc_start, capacity, window)
    slot_B, mask_B1SC = shared[key]
    b = Builder(graph, node)
    present_key = b.op("TensorScatter", past_key, k, slot_B, axis=-2, mode="linear")
    present_value = b.op("TensorScatter", past_value, v, slot_B, axis=-2, mode="linear")
    out = b.op("Attention", q, present_key, present_value, mask_B1SC)
    replace(node, [out, present_key, present_value])


def _slot_and_mask(
    b: Builder, positions_BS: ir.Value, doc_start_BS: ir.Value, capacity: int, window: int
) -> tuple[ir.Value, ir.Value]:
    """First slot to write [B] and visibility [B, 1, S, C]."""
    slots_C = b.const(range(capacity))
    modulus = b.const(capacity)
    first_B = b.op("Gather", positions_BS, b.const(0), axis=1)
    slot_B = b.op("Mod", first_B, modulus)
    last_B1 = b.op("Gather", positions_BS, b.const([-1]), axis=1)
    age_BC = b.op("Mod", b.op("Sub", last_B1, slots_C), modulus)
    held_B11C = b.op("Unsqueeze", b.op("Sub", last_B1, age_BC), b.const([1, 2]))
    oldest_BS = doc_start_BS
    if window:
        oldest_BS = b.op("Max", doc_start_BS, b.op("Sub", positions_BS, b.const(window - 1)))
    axes = b.const([1, 3])
    old_enough = b.op("GreaterOrEqual", held_B11C, b.op("Unsqueeze", oldest_BS, axes))
    causal = b.op("LessOrEqual", held_B11C, b.op("Unsqueeze", positions_BS, axes))
    return slot_B, b.op("And", old_enough, causal)
