"""Lowering for ONNX Runtime on GPUs (CUDA and WebGPU): every node of a graph runs on the device.

As in the flavour ort, blt.CachedAttention becomes `com.microsoft::GroupQueryAttention`. The differences:

- Caches are linear: slot of position p is p - doc_start. A window is an attention mask (local_window_size). On CUDA the
  evicting cache (sliding_window_cache) needs a capacity equal to the window, and WebGPU refuses it.
- total_sequence_length is a constant, the capacity. The host reads it, so a computed one would be a copy and a wait in
  each call, and a captured CUDA graph would keep the first one.
- No position ids: a key is rotated by its slot. Rotation is relative, so the scores are the same. CUDA's kernels for
  one position ignore position ids.
- LogSoftmax is max, exp, sum and log; "or" is Not and And; "any" is the largest of float32 values, not of integers.
  WebGPU has no kernels for the originals.
- The slices of a patch are read by `com.microsoft::MultiHeadAttention`. WebGPU has no kernel for Attention.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from blt_runtime.bundle.spec import GraphSpec

from ..rewrite import Builder, integer, nodes, replace, required
from .common import check_lowered, lower_norms, lower_ropes
from .ort import CONTRIB, last_entries, lower_attentions

POSITION_IDS = 9
"""The input of GroupQueryAttention."""


def lower(model: ir.Model, spec: GraphSpec) -> int:
    """Replace every `blt` operator; returns how many. `ort.supports` must hold."""
    capacity = spec.cache.capacity if spec.cache else 0

    def lengths(b: Builder, positions_BS: ir.Value, doc_start_BS: ir.Value) -> tuple[ir.Value, ir.Value]:
        return last_entries(b, positions_BS, doc_start_BS), b.const(capacity, np.int32)

    count = lower_attentions(model, spec, lengths) + lower_norms(model) + lower_ropes(model)
    count += _lower_log_softmax(model) + _lower_or(model) + _lower_any(model)
    check_lowered(model, spec)
    return count


def _lower_log_softmax(model: ir.Model) -> int:
    found = nodes(model, "LogSoftmax")
    for node in found:
        x = required(node.inputs[0])
        b = Builder(model.graph, node)
        axes = b.const([integer(node, "axis", -1)])
        centred = b.op("Sub", x, b.op("ReduceMax", x, axes, keepdims=1))
        total = b.op("ReduceSum", b.op("Exp", centred), axes, keepdims=1)
        replace(node, [b.op("Sub", centred, b.op("Log", total))])
    return len(found)


def _lower_or(model: ir.Model) -> int:
    found = nodes(model, "Or")
    for node in found:
        a, b = (required(value) for value in node.inputs)
        build = Builder(model.graph, node)
        replace(node, [build.op("Not", build.op("And", build.op("Not", a), build.op("Not", b)))])
    return len(found)


def _lower_any(model: ir.Model) -> int:
    """Cast(ReduceMax(Cast(x, int64)), bool) of booleans x: the inner Cast becomes one to float32."""
    found = 0
    for node in nodes(model, "ReduceMax"):
        cast = required(node.inputs[0]).producer()
        if cast is None or cast.op_type != "Cast" or integer(cast, "to") != ir.DataType.INT64:
            continue
        b = Builder(model.graph, node)
        largest = b.op(
            "ReduceMax",
            b.op("Cast", cast.inputs[0], to=ir.DataType.FLOAT),
            *node.inputs[1:],
            keepdims=integer(node, "keepdims", 1),
        )
        for reader in list(node.outputs[0].consumers()):
            if reader.op_type != "Cast" or integer(reader, "to") != ir.DataType.BOOL:
                raise ValueError(f"ReduceMax of integers is read by {reader.op_type}, not as a boolean")
            reader.replace_input_with(0, largest)
        found += 1
    return found


def finish(model: ir.Model) -> int:
    """After the fusions: slices are read by MultiHeadAttention, and no attention has position ids. Returns how many
    attentions there are."""
    slices, attentions = nodes(model, "Attention"), nodes(model, "GroupQueryAttention", CONTRIB)
    for node in slices:
        heads, scale = integer(node, "q_num_heads"), node.attributes["scale"].as_float()
        b = Builder(model.graph, node)
        replace(node, [b.op("MultiHeadAttention", *node.inputs[:3], domain=CONTRIB, num_heads=heads, scale=scale)])
    rotating = [
        node for node in attentions if len(node.inputs) > POSITION_IDS and node.inputs[POSITION_IDS] is not None
    ]
    for node in rotating:
        node.replace_input_with(POSITION_IDS, None)
    return len(slices) + len(rotating)
