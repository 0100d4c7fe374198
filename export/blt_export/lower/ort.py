"""ONNX Runtime lowering: cached attention becomes `com.microsoft::GroupQueryAttention`.

blt.CachedAttention becomes GroupQueryAttention with past and present in one buffer: its cost follows the valid
length, not the capacity. The cache restarts at slot 0 with each document, so the host cuts chunks at document starts:
   seqlens_k[b]          = last position - doc_start            (entries after this call, less one)
   total_sequence_length = the largest of them, plus one
computed once per graph. Rotation stays a node of its own, because positions go on across documents.
Window layers: local_window_size = window; sliding_window_cache 1 where the cache is shorter than the stream, and then
the operator evicts.

Heads stay packed, [B, S, H*K]: Reshape and Transpose around the attention go. RotaryEmbedding and
GroupQueryAttention both take the packed form (RMSNormalization and RotaryEmbedding of the standard are as fast on
CPU as their older contrib forms: 0.5 us at width 512).

GroupQueryAttention takes head sizes that are multiples of 8. A graph with another one gets the portable lowering, and
its window cache is a ring (`takes` decides, here and in `specs`).

Letters: B rows, S positions of this call, H heads, G key/value heads, K head size.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir

from blt_runtime.bundle.spec import GraphSpec

from ..capture.translate import DOMAIN
from ..rewrite import Builder, dims, nodes, replace, required, static, swap
from . import portable
from .common import check_lowered, lower_norms, lower_ropes

log = logging.getLogger("blt_export")

CONTRIB = "com.microsoft"
_SPLIT_HEADS = [0, 2, 1, 3]


def takes(spec: GraphSpec) -> bool:
    """Whether GroupQueryAttention accepts the heads of this graph."""
    head_sizes = {spec.tensor(name).shape[3] for name in spec.aliases}
    return all(isinstance(size, int) and size % 8 == 0 for size in head_sizes)


def lower(model: ir.Model, spec: GraphSpec) -> int:
    """Replace every `blt` operator; returns how many."""
    if not takes(spec):
        log.info("%s: GroupQueryAttention takes heads of 8, 16, ... numbers: lowered as portable", spec.name)
        return portable.lower(model, spec)
    model.graph.opset_imports[CONTRIB] = 1
    lengths: dict[tuple[str | None, str | None], tuple[ir.Value, ir.Value]] = {}
    attentions = nodes(model, "CachedAttention", DOMAIN)
    for node in attentions:
        _lower_attention(model.graph, node, spec, lengths, attentions[0])
    count = len(attentions) + lower_norms(model) + _remove_dead_ropes(model) + lower_ropes(model)
    check_lowered(model, spec)
    return count


def _lower_attention(
    graph: ir.Graph,
    node: ir.Node,
    spec: GraphSpec,
    lengths: dict[tuple[str | None, str | None], tuple[ir.Value, ir.Value]],
    first: ir.Node,
) -> None:
    q, k, v, past_key, past_value, positions, doc_start = (required(value) for value in node.inputs)
    key = (positions.name, doc_start.name)
    if key not in lengths:
        lengths[key] = _lengths(Builder(graph, first), positions, doc_start)
    b = Builder(graph, node)
    heads, head_size = static(q, 1), static(q, 3)
    packed_out, present_key, present_value = b.op(
        "GroupQueryAttention",
        _packed(b, q),
        _packed(b, k),
        _packed(b, v),
        past_key,
        past_value,
        *lengths[key],
        domain=CONTRIB,
        outputs=3,
        num_heads=heads,
        kv_num_heads=static(past_key, 1),
        do_rotary=0,
        attributes=_window(node, spec),
    )
    _unpack(b, node.outputs[0], packed_out, heads, head_size)
    replace(node, [None, present_key, present_value])


def _window(node: ir.Node, spec: GraphSpec) -> dict[str, int]:
    window = node.attributes["window"].as_int()
    if not window:
        return {}
    evicts = spec.cache is not None and spec.cache.kind == "window"
    return {"local_window_size": window, **({"sliding_window_cache": 1} if evicts else {})}


def _lengths(b: Builder, positions_BS: ir.Value, doc_start_BS: ir.Value) -> tuple[ir.Value, ir.Value]:
    """seqlens_k int32 [B] and total_sequence_length int32 scalar."""
    age_BS = b.op("Sub", positions_BS, doc_start_BS)
    last_B = b.op("Cast", b.op("Gather", age_BS, b.const(-1), axis=1), to=ir.DataType.INT32)
    longest = b.op("ReduceMax", last_B, keepdims=0)
    return last_B, b.op("Add", longest, b.const(1, np.int32))


def _packed(b: Builder, x_BHSK: ir.Value) -> ir.Value:
    """The [B, S, H*K] form of a [B, H, S, K] value, without work where it was made from one."""
    node = x_BHSK.producer()
    if node is not None and (node.domain, node.op_type) == (DOMAIN, "Rope"):
        x, cos, sin = (required(value) for value in node.inputs)
        packed: ir.Value = b.op("RotaryEmbedding", _packed(b, x), cos, sin, interleaved=1, num_heads=static(x_BHSK, 1))
        return packed
    if node is not None and node.op_type == "Transpose" and _perm(node) == _SPLIT_HEADS:
        split = required(node.inputs[0]).producer()
        if split is not None and split.op_type == "Reshape" and len(dims(split.inputs[0]) or []) == 3:
            return required(split.inputs[0])
    x_BSHK = b.op("Transpose", x_BHSK, perm=_SPLIT_HEADS)
    x_BSD: ir.Value = b.op("Reshape", x_BSHK, b.const([0, 0, static(x_BHSK, 1) * static(x_BHSK, 3)]))
    return x_BSD


def _unpack(b: Builder, out_BHSK: ir.Value, packed_BSD: ir.Value, heads: int, head_size: int) -> None:
    """Give users of the attention's output the packed value; those that wanted [B, H, S, K] get it split."""
    for user in list(out_BHSK.consumers()):
        if user.op_type == "Transpose" and _perm(user) == _SPLIT_HEADS:
            for merge in list(user.outputs[0].consumers()):
                if merge.op_type == "Reshape" and len(dims(merge.outputs[0]) or []) == 3:
                    replace(merge, [packed_BSD])
            if not user.outputs[0].uses() and not user.outputs[0].is_graph_output():
                b.graph.remove(user, safe=True)
    if out_BHSK.uses() or out_BHSK.is_graph_output():
        x_BSHK = b.op("Reshape", packed_BSD, b.const([0, 0, heads, head_size]))
        split_BHSK = b.op("Transpose", x_BSHK, dtype=out_BHSK.dtype, shape=dims(out_BHSK), perm=_SPLIT_HEADS)
        swap(out_BHSK, split_BHSK)


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else []


def _remove_dead_ropes(model: ir.Model) -> int:
    """The unpacked rotations and splits that packing left without users."""
    dead = 0
    for node in reversed(list(model.graph)):
        unused = not any(o.uses() or o.is_graph_output() for o in node.outputs)
        if unused and (node.op_type in ("Transpose", "Reshape") or node.domain == DOMAIN):
            dead += node.domain == DOMAIN
            model.graph.remove(node, safe=True)
    return dead
