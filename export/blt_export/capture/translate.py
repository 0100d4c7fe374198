"""The custom operators of `blt.model.ops` in ONNX: schemas of domain `blt`, and how the exporter writes them.

The exporter writes one bare node per operator; `lower` replaces it later. The exporter's optimiser and version
conversion keep the bare node only because its schema is registered here.

torch                    ONNX                 inputs                                   attributes
blt::cached_attention    blt.CachedAttention  q k v past_key past_value positions      window (0: none)
                                              doc_start
blt::rms_norm            blt.RMSNorm          x weight                                 eps
blt::rope                blt.Rope             x cos sin                                -
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript import opset18
from onnxscript.values import Opset

import blt.model.ops  # noqa: F401  (registers torch.ops.blt)

DOMAIN = "blt"
VERSION = 1

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_INT64 = "tensor(int64)"
_SCHEMAS: dict[str, tuple[list[tuple[str, str]], list[str], dict[str, Any]]] = {
    "CachedAttention": (
        [(name, "T") for name in ("q", "k", "v", "past_key", "past_value")]
        + [("positions", _INT64), ("doc_start", _INT64)],
        ["out", "present_key", "present_value"],
        {"window": onnx.defs.OpSchema.AttrType.INT},
    ),
    "RMSNorm": ([("x", "T"), ("weight", "T")], ["y"], {"eps": onnx.defs.OpSchema.AttrType.FLOAT}),
    "Rope": ([("x", "T"), ("cos", "T"), ("sin", "T")], ["y"], {}),
}


def _schema(name: str) -> onnx.defs.OpSchema:
    inputs, outputs, attributes = _SCHEMAS[name]
    parameter = onnx.defs.OpSchema.FormalParameter
    return onnx.defs.OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[parameter(i, kind) for i, kind in inputs],
        outputs=[parameter(o, "T") for o in outputs],
        type_constraints=[("T", _FLOATS, "float tensors")],
        attributes=[onnx.defs.OpSchema.Attribute(a, kind) for a, kind in attributes.items()],
    )


@functools.cache
def register_schemas() -> None:
    """Make the `blt` operators known to `onnx` (once per process)."""
    for name in _SCHEMAS:
        if not onnx.defs.has(name, DOMAIN):
            onnx.defs.register_schema(_schema(name))


def _to_dtype(x: Any, dtype: int, *_: Any) -> Any:
    return opset18.Cast(x, to=dtype)


def _and(a: Any, b: Any) -> Any:
    return opset18.And(a, b)


def _or(a: Any, b: Any) -> Any:
    return opset18.Or(a, b)


_UNDECOMPOSED: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.to.dtype: _to_dtype,
    torch.ops.aten.__and__.Tensor: _and,
    torch.ops.aten.__or__.Tensor: _or,
}
"""Operators that torch.onnx translates only after decomposition. The model uses `&` and `|` on booleans only."""


@functools.cache
def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """`custom_translation_table` for `torch.onnx.export`: one bare node per custom operator."""
    register_schemas()
    opset = Opset(DOMAIN, VERSION)

    def cached_attention(
        q: Any, k: Any, v: Any, past_key: Any, past_value: Any, positions: Any, doc_start: Any, window: int
    ) -> Any:
        return opset.CachedAttention(q, k, v, past_key, past_value, positions, doc_start, window=window)

    def rms_norm(x: Any, weight: Any, eps: float) -> Any:
        return opset.RMSNorm(x, weight, eps=eps)

    def rope(x: Any, cos: Any, sin: Any) -> Any:
        return opset.Rope(x, cos, sin)

    ops = torch.ops.blt
    return {
        **_UNDECOMPOSED,
        ops.cached_attention.default: cached_attention,
        ops.rms_norm.default: rms_norm,
        ops.rope.default: rope,
    }
