"""Matrices of 8-bit floats (E4M3: 4 bits of exponent, 3 of mantissa) for TensorRT, made when engines are built.

Rules
1. MatMul(x, W) with a constant matrix W [K, N] becomes MatMul(x, DequantizeLinear(codes, scales)): codes [K, N] of
   float8e4m3fn, scales [N] of W's type. A scale is the largest |w| of its output over LARGEST, and the codes are those
   of the rounded scale. An output of zeros has the scale 1, because TensorRT demands positive scales.

Only weights are rounded, by up to 2^-4 of their size, so no activations need to be seen beforehand.
`round_weights` is the slow reference: it stores the rounded weights, which a CPU multiplies by.

Letters: K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..rewrite import Builder, lazy_initializer, nodes, required

FP8 = ir.DataType.FLOAT8E4M3FN
LARGEST = 448.0
Array = npt.NDArray[Any]
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def run(model: ir.Model) -> int:
    """Returns how many matrices are codes now. They are computed when the graph is written."""
    found = list(_matrices(model))
    for node, weight, tensor in found:
        (k, n), dtype = tensor.shape.numpy(), tensor.dtype
        codes = lazy_initializer(model.graph, f"{weight.name}.codes", FP8, (k, n), partial(_codes, tensor))
        scales = lazy_initializer(model.graph, f"{weight.name}.scales", dtype, (n,), partial(_scales, tensor))
        b = Builder(model.graph, node)
        node.replace_input_with(1, b.op("DequantizeLinear", codes, scales, dtype=dtype, shape=(k, n), axis=1))
    _remove_unused(model, {weight for _, weight, _ in found})
    return len(found)


def round_weights(model: ir.Model) -> int:
    """The same numbers, stored as W's type. Returns how many matrices were rounded."""
    found = list(_matrices(model))
    for node, weight, tensor in found:
        name, shape = f"{weight.name}.rounded", tensor.shape.numpy()
        node.replace_input_with(1, lazy_initializer(model.graph, name, tensor.dtype, shape, partial(_rounded, tensor)))
    _remove_unused(model, {weight for _, weight, _ in found})
    return len(found)


def _codes(tensor: ir.TensorProtocol) -> Array:
    return narrow(tensor.numpy())[0]


def _scales(tensor: ir.TensorProtocol) -> Array:
    return narrow(tensor.numpy())[1]


def _rounded(tensor: ir.TensorProtocol) -> Array:
    return widen(*narrow(tensor.numpy()))


def narrow(w_KN: Array) -> tuple[Array, Array]:
    """Codes [K, N] and scales [N]."""
    floats_KN = w_KN.astype(np.float32)
    scale_N = (np.abs(floats_KN).max(0) / np.float32(LARGEST)).astype(w_KN.dtype)
    scale_N = np.where(scale_N == 0, np.ones_like(scale_N), scale_N)
    codes_KN = (floats_KN / scale_N.astype(np.float32)).clip(-LARGEST, LARGEST)
    return codes_KN.astype(FP8.numpy()), scale_N


def widen(codes_KN: Array, scale_N: Array) -> Array:
    """The weights that codes and scales represent, in the type of the scales."""
    floats_KN: Array = (codes_KN.astype(np.float32) * scale_N.astype(np.float32)).astype(scale_N.dtype)
    return floats_KN


def _matrices(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value, ir.TensorProtocol]]:
    for node in nodes(model, "MatMul"):
        weight = required(node.inputs[1])
        tensor = weight.const_value if weight.is_initializer() else None
        if tensor is not None and len(tensor.shape) == 2 and tensor.dtype in _FLOATS:
            yield node, weight, tensor


def _remove_unused(model: ir.Model, weights: set[ir.Value]) -> None:
    for weight in weights:
        if not weight.uses():
            model.graph.initializers.pop(str(weight.name))
