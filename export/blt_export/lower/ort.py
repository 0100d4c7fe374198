"""ONNX Runtime lowering: cached attention becomes `com.microsoft::GroupQueryAttention`.

blt.CachedAttention becomes GroupQueryAttention with past and present in one buffer: its cost follows the valid
length, not the capacity. The cache restarts at slot 0 with each document, so the host cuts chunks at document starts:
   seqlens_k[b]          = last position - doc_start            (entries after this call, less one)
   total_sequence_length = the largest of them, plus one
computed once per graph. Rotation stays a separate node, because positions continue across documents.
Window layers: local_window_size = window; sliding_window_cache 1 where the cache is shorter than the stream, and then
the operator evicts.

GroupQueryAttention takes heads packed, [B, S, H*K], so Transpose and Reshape are put around it; `passes.pack_heads`
removes them. RMSNormalization and RotaryEmbedding of the standard are as fast on CPU as their older contrib forms:
0.5 us at width 512.

GroupQueryAttention takes head sizes that are multiples of 8. A graph with another one gets the portable lowering, and
its window cache is a ring (`supports` decides, here and in `specs`).

Letters: B rows, S positions of this call, H heads, G key/value heads, K head size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from blt_runtime.bundle.spec import GraphSpec

from ..capture.translate import DOMAIN
from ..rewrite import Builder, dims, nodes, replace, required, static
from . import portable
from .common import check_lowered, lower_norms, lower_ropes

log = logging.getLogger("blt_export")

CONTRIB = "com.microsoft"
Lengths = Callable[[Builder, ir.Value, ir.Value], tuple[ir.Value, ir.Value]]
SWAP_HEADS = [0, 2, 1, 3]


def supports(spec: GraphSpec) -> bool:
    """Whether GroupQueryAttention accepts the heads of this graph."""
    head_sizes = {spec.tensor(name).shape[3] for name in spec.aliases}
    return all(isinstance(size, int) and size % 8 == 0 for size in head_sizes)


def lower(model: ir.Model, spec: GraphSpec) -> int:
    """Replace every `blt` operator; returns how many."""
    if not supports(spec):
        log.info("%s: head size no multiple of 8, GroupQueryAttention needs one: lowered as portable", spec.name)
        return portable.lower(model, spec)
    count = lower_attentions(model, spec, _lengths) + lower_norms(model) + lower_ropes(model)
    check_lowered(model, spec)
    return count


def lower_attentions(model: ir.Model, spec: GraphSpec, lengths: Lengths) -> int:
    """Replace every CachedAttention. lengths: makes seqlens_k [B] and total_sequence_length from positions and
    doc_start, once for equal ones."""
    model.graph.opset_imports[CONTRIB] = 1
    made: dict[tuple[str | None, str | None], tuple[ir.Value, ir.Value]] = {}
    attentions = nodes(model, "CachedAttention", DOMAIN)
    for node in attentions:
        positions, doc_start = (required(value) for value in node.inputs[5:7])
        key = (positions.name, doc_start.name)
        if key not in made:
            made[key] = lengths(Builder(model.graph, attentions[0]), positions, doc_start)
        _lower_attention(model.graph, node, spec, made[key])
    return len(attentions)


def _lower_attention(graph: ir.Graph, node: ir.Node, spec: GraphSpec, lengths: tuple[ir.Value, ir.Value]) -> None:
    q, k, v, past_key, past_value = (required(value) for value in node.inputs[:5])
    b = Builder(graph, node)
    packed_out, present_key, present_value = b.op(
        "GroupQueryAttention",
        _packed(b, q),
        _packed(b, k),
        _packed(b, v),
        past_key,
        past_value,
        *lengths,
        domain=CONTRIB,
        outputs=3,
        num_heads=static(q, 1),
        kv_num_heads=static(past_key, 1),
        do_rotary=0,
        attributes=_window(node, spec),
    )
    replace(node, [_split(b, packed_out, q), present_key, present_value])


def _window(node: ir.Node, spec: GraphSpec) -> dict[str, int]:
    window = node.attributes["window"].as_int()
    if not window:
        return {}
    evicts = spec.cache is not None and spec.cache.kind == "window"
    return {"local_window_size": window, **({"sliding_window_cache": 1} if evicts else {})}


def _lengths(b: Builder, positions_BS: ir.Value, doc_start_BS: ir.Value) -> tuple[ir.Value, ir.Value]:
    """seqlens_k int32 [B] and total_sequence_length int32 scalar."""
    last_B = last_entries(b, positions_BS, doc_start_BS)
    longest = b.op("ReduceMax", last_B, keepdims=0)
    return last_B, b.op("Add", longest, b.const(1, np.int32))


def last_entries(b: Builder, positions_BS: ir.Value, doc_start_BS: ir.Value) -> ir.Value:
    """seqlens_k int32 [B]: entries of the document after this call, less one."""
    age_BS = b.op("Sub", positions_BS, doc_start_BS)
    last_B: ir.Value = b.op("Cast", b.op("Gather", age_BS, b.const(-1), axis=1), to=ir.DataType.INT32)
    return last_B


def _packed(b: Builder, x_BHSK: ir.Value) -> ir.Value:
    """The [B, S, H*K] form of a [B, H, S, K] value."""
    x_BSHK = b.op("Transpose", x_BHSK, perm=SWAP_HEADS)
    width = static(x_BHSK, 1) * static(x_BHSK, 3)
    packed_BSD: ir.Value = b.op("Reshape", x_BSHK, b.const([0, 0, width]))
    _annotate(packed_BSD, x_BHSK)
    return packed_BSD


def _split(b: Builder, packed_BSD: ir.Value, like_BHSK: ir.Value) -> ir.Value:
    """The [B, H, S, K] form of a [B, S, H*K] value."""
    _annotate(packed_BSD, like_BHSK)
    x_BSHK = b.op("Reshape", packed_BSD, b.const([0, 0, static(like_BHSK, 1), static(like_BHSK, 3)]))
    split_BHSK: ir.Value = b.op("Transpose", x_BSHK, perm=SWAP_HEADS)
    return split_BHSK


def _annotate(packed_BSD: ir.Value, split_BHSK: ir.Value) -> None:
    """Give the packed form its type and shape: `pack_heads` compares shapes."""
    packed_BSD.type = split_BHSK.type
    sizes = dims(split_BHSK)
    if sizes is not None:
        packed_BSD.shape = ir.Shape([sizes[0], sizes[2], static(split_BHSK, 1) * static(split_BHSK, 3)])
