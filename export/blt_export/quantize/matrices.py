"""Matrices of 8 or 4 bits. This changes numerics, and happens only in graphs that the caller chose.

Rules
1. MatMul(x, W) with a constant float32 matrix W [K, N] becomes MatMulNBits(x, codes, scales[, zero points]).
   In the flavour portable it becomes MatMul(x, DequantizeLinear(codes, scales)): codes [K, N] of int8 or int4, scales
   [N] of whole rows or [K / block, N].
2. K must be a multiple of the block; a matrix with another K stays float32, with a reason in the outcome.
3. Everything else stays float32: embeddings (gathered, not multiplied), norms, rotary tables. In the flavours cuda and
   portable it becomes float16 afterwards (`passes.halve`), the scales too.

FORMATS were chosen by bits per byte of trained weights (docs/demo.md). ACCURACY_LEVEL 4 lets the kernels round
activations to 8 bits, a block at a time, and multiply integers. One core of an AVX-512 machine with VNNI, 1024 x 1024,
ONNX Runtime 1.30 and 1.32 alike, where a float32 MatMul takes 58 us for a row and 2.6 ms for 128:
    8 bits, block 128    level 4: 23 us, 1.3 ms    level 0: 4,300 us, 16 ms (each call expands the weight)
    4 bits, block 32     level 4: 27 us, 2.0 ms    level 0: 82 us, 2.9 ms
Rounded activations make the error of a product 0.9 % instead of 0.6 % at 8 bits; at 4 bits it is 8 % either way.
Level 4 needs prepacked weights: without prepacking each call expands them, 25 ms instead of 25 us.

DEVICE_FORMATS are of the flavour cuda: blocks of 32 without zero points, for which CUDA has kernels of single rows.
STANDARD_FORMATS are of the flavour portable. TensorRT documents blocks for 4 bits only, and its parser demands positive
scales at 8 bits. At 4 bits it takes any. Positive ones would cost 1.19 % bits per byte instead of 1.06 % (demo model,
text of docs/gpu.md). Activations are not rounded in either.

Codes are computed when the file is written (lazy tensors), so only one float weight is in memory at a time.

Requires: a lowered graph, weights folded ([in, out]). Ensures: nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from blt_runtime.bundle.manifest import around_codes
from blt_runtime.errors import UsageError, nearest

from ..passes.halve import HALVES
from ..rewrite import Builder, lazy_initializer, nodes, replace, required
from .blockwise import WHOLE_ROW, Blocks, Floats, Format, block_error, dequantise, from_signed, quantise, signed

FORMATS = {"int8": Format(8, 128), "int4": Format(4, 32, shrink=(0.95, 0.9, 0.85, 0.8, 0.75))}
DEVICE_FORMATS = {name: replaced(form, block=32, half_scales=True) for name, form in FORMATS.items()}
STANDARD_FORMATS = {**DEVICE_FORMATS, "int8": Format(8, WHOLE_ROW, half_scales=True, positive=True)}
OF_FLAVOUR = {"ort": FORMATS, "cuda": DEVICE_FORMATS, "portable": STANDARD_FORMATS}
PRECISIONS = ("fp32", *HALVES, *FORMATS)
DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
ACCURACY_LEVEL = {"ort": 4, "cuda": 0}


@dataclass(frozen=True)
class Packed:
    """A weight that became codes: the tensor of its float32 values [K, N], and how it is packed."""

    name: str
    source: ir.TensorProtocol
    form: Format

    def names(self) -> tuple[str, str, str | None]:
        """Of the initializers: codes, scales, zero points."""
        return f"{self.name}.codes", f"{self.name}.scales", f"{self.name}.zeros" if self.form.zero_points else None

    @property
    def weights(self) -> int:
        return int(np.prod(self.source.shape.numpy()))

    @property
    def bytes(self) -> float:
        return self.weights * self.form.bits_per_weight / 8

    def floats(self) -> Floats:
        """[N, K]; a view, so that only rows in use are copied."""
        array: Floats = self.source.numpy().T
        return array


@dataclass(frozen=True)
class Outcome:
    """The packed matrices of a graph, and the reasons why others stayed float32."""

    packed: tuple[Packed, ...] = ()
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        weights, after = sum(p.weights for p in self.packed), sum(p.bytes for p in self.packed)
        done = f"{len(self.packed)} weights, {4 * weights:,} bytes now {after:,.0f}"
        return f"{done}; {len(self.kept)} stay floats: {'; '.join(self.kept)}" if self.kept else done


def check(flavour: str, precision: str, precision_of: Mapping[str, str]) -> None:
    """Raises UsageError for a precision that is unknown or not supported in this flavour."""
    for value in (precision, *precision_of.values()):
        if value not in PRECISIONS:
            raise UsageError(f"precision {value!r}: choose one of {', '.join(PRECISIONS)}")
        if value == "bf16" and flavour == "ort":
            raise UsageError("precision bf16 runs on GPUs: choose the flavour cuda or portable, or fp16")


def choose(precision: str, precision_of: Mapping[str, str], graphs: Mapping[str, Any]) -> dict[str, str]:
    """The precision of each graph. Raises UsageError for the name of a graph that the model lacks."""
    for name in precision_of:
        if name not in graphs:
            raise UsageError(f"precision of {name!r}: this model has no such graph: {nearest(name, graphs)}")
    return {name: precision_of.get(name, precision) for name in graphs}


def activations(precisions: Mapping[str, str], flavour: str) -> dict[str, str]:
    """The precision of what is not packed."""
    return {name: around_codes(flavour) if p in FORMATS else p for name, p in precisions.items()}


def run(model: ir.Model, precision: str, flavour: str = "ort") -> Outcome:
    """Pack the matrices of one graph; "fp32" changes nothing."""
    if precision not in FORMATS:
        return Outcome()
    form = OF_FLAVOUR[flavour][precision]
    packed: dict[ir.Value, Packed] = {}
    kept: dict[ir.Value, str] = {}
    for node in nodes(model, "MatMul"):
        weight = required(node.inputs[1])
        tensor = weight.const_value if weight.is_initializer() else None
        if tensor is None or len(tensor.shape) != 2 or tensor.dtype is not ir.DataType.FLOAT:
            continue
        try:
            of_rows = form.of_rows(int(tensor.shape.numpy()[0]))
        except ValueError as reason:
            kept[weight] = f"{weight.name}: {reason}"
            continue
        packed.setdefault(weight, Packed(str(weight.name), tensor, of_rows))
        if flavour == "portable":
            _dequantise(model.graph, node, packed[weight])
        else:
            _replace(model.graph, node, packed[weight], ACCURACY_LEVEL[flavour])
    for weight in packed:
        if not weight.uses():
            model.graph.initializers.pop(str(weight.name))
    if packed and flavour != "portable":
        model.graph.opset_imports[DOMAIN] = 1
    return Outcome(tuple(packed.values()), tuple(kept.values()))


def read_error(path: Path, packed: tuple[Packed, ...]) -> float:
    """The largest error of a written graph's codes against the float weights: `blockwise.block_error`."""
    written = ir.load(path).graph.initializers
    worst = 0.0
    for weight in packed:
        got_NK = dequantise(_blocks(written, weight), weight.form)
        worst = max(worst, block_error(got_NK, weight.floats(), weight.form))
    return worst


def _blocks(written: Mapping[str, ir.Value], weight: Packed) -> Blocks:
    names = weight.names()
    codes, scales = (_written(written, name) for name in names[:2])
    zeros = None if names[2] is None else _written(written, names[2])
    if written[names[0]].dtype is not ir.DataType.UINT8:  # of a DequantizeLinear
        return from_signed(codes.astype(np.int8).T, scales.reshape(-1, codes.shape[1]).T, weight.form)
    return Blocks(codes, scales, zeros)


def _written(initializers: Mapping[str, ir.Value], name: str) -> Any:
    """The array; scales are float32 or, under another name, float16."""
    half = initializers.get(f"{name}.half")
    return _array(initializers[name]) if half is None else _array(half).astype(np.float32)


def _replace(graph: ir.Graph, node: ir.Node, weight: Packed, accuracy_level: int) -> None:
    k, n = (int(size) for size in weight.source.shape.numpy())
    inputs = [required(node.inputs[0]), *_initializers(graph, weight, n, k)]
    sizes = {"K": k, "N": n, "bits": weight.form.bits, "block_size": weight.form.block}
    options = {**sizes, "accuracy_level": accuracy_level}
    replace(node, [Builder(graph, node).op(OPERATOR, *inputs, domain=DOMAIN, attributes=options)])


def _dequantise(graph: ir.Graph, node: ir.Node, weight: Packed) -> None:
    """The right side of the MatMul becomes a DequantizeLinear. 8 bits have one scale for each output."""
    k, n = (int(size) for size in weight.source.shape.numpy())
    form, names = weight.form, weight.names()
    narrow = {8: ir.DataType.INT8, 4: ir.DataType.INT4}[form.bits]
    shape: tuple[int, ...] = (n,)
    options = {"axis": 1}
    if form.bits == 4:
        shape, options = ((k // form.block, n), {"axis": 0, "block_size": form.block})
    once = _Once(weight, lambda b: (signed(b, form).T.astype(narrow.numpy()), b.scales.T.reshape(shape)))
    codes = lazy_initializer(graph, names[0], narrow, (k, n), lambda: once.array(0))
    scales = lazy_initializer(graph, names[1], ir.DataType.FLOAT, shape, lambda: once.array(1))
    floats = Builder(graph, node).op(
        "DequantizeLinear", codes, scales, dtype=ir.DataType.FLOAT, shape=(k, n), attributes=options
    )
    node.replace_input_with(1, floats)


def _initializers(graph: ir.Graph, weight: Packed, n: int, k: int) -> list[ir.Value]:
    form, blocks = weight.form, k // weight.form.block
    names, once = weight.names(), _Once(weight, lambda b: (b.codes, b.scales, b.zeros))
    made = [
        lazy_initializer(
            graph, names[0], ir.DataType.UINT8, (n, blocks, form.block * form.bits // 8), lambda: once.array(0)
        ),
        lazy_initializer(graph, names[1], ir.DataType.FLOAT, (n, blocks), lambda: once.array(1)),
    ]
    if names[2] is not None:
        sizes = (n, -(-blocks * form.bits // 8))
        made.append(lazy_initializer(graph, names[2], ir.DataType.UINT8, sizes, lambda: once.array(2)))
    return made


class _Once:
    """The arrays of a packed weight: all computed at the first call, each released when it is returned."""

    def __init__(self, weight: Packed, arrays: Callable[[Blocks], tuple[Any, ...]]) -> None:
        self._weight, self._of = weight, arrays
        self._arrays: dict[int, Any] = {}

    def array(self, index: int) -> Any:
        if index not in self._arrays:
            blocks = quantise(self._weight.floats(), self._weight.form)
            self._arrays = dict(enumerate(self._of(blocks)))
        return self._arrays.pop(index)


def _array(value: ir.Value) -> Any:
    assert value.const_value is not None
    return value.const_value.numpy()
