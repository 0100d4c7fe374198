"""Matrices of 8 or 4 bits. This changes numerics, and happens only in graphs that the caller chose.

Rules
1. MatMul(x, W) with a constant float32 matrix W [K, N] becomes MatMulNBits(x, codes, scales[, zero points]).
2. K must be a multiple of the block; a matrix with another K stays float32, with a reason in the outcome.
3. Everything else stays float32: embeddings (gathered, not multiplied), norms, rotary tables. In the flavour cuda it
   becomes float16 afterwards (`passes.halve`), the scales too.

FORMATS were chosen by bits per byte of trained weights (docs/demo.md). ACCURACY_LEVEL 4 lets the kernels round
activations to 8 bits, a block at a time, and multiply integers. One core of an AVX-512 machine with VNNI, 1024 x 1024,
ONNX Runtime 1.30 and 1.32 alike, where a float32 MatMul takes 58 us for a row and 2.6 ms for 128:
    8 bits, block 128    level 4: 23 us, 1.3 ms    level 0: 4,300 us, 16 ms (each call expands the weight)
    4 bits, block 32     level 4: 27 us, 2.0 ms    level 0: 82 us, 2.9 ms
Rounded activations make the error of a product 0.9 % instead of 0.6 % at 8 bits; at 4 bits it is 8 % either way.
Level 4 needs prepacked weights: without prepacking each call expands them, 25 ms instead of 25 us.

DEVICE_FORMATS are of the flavour cuda: blocks of 32 without zero points, for which CUDA has kernels of single rows.
Activations are not rounded.

Codes are computed when the file is written (lazy tensors), so only one float weight is in memory at a time.

Requires: graphs of the flavours `ort` or `cuda`, lowered, weights folded ([in, out]). Ensures: nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from blt_runtime.errors import UsageError, nearest

from ..passes.halve import HALVES
from ..rewrite import Builder, nodes, replace, required
from .blockwise import Blocks, Floats, Format, block_error, dequantise, quantise

FORMATS = {"int8": Format(8, 128), "int4": Format(4, 32, shrink=(0.95, 0.9, 0.85, 0.8, 0.75))}
DEVICE_FORMATS = {name: replaced(form, block=32, half_scales=True) for name, form in FORMATS.items()}
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
    """Raises UsageError for a precision that is unknown or not supported (yet, or in this flavour)."""
    for value in (precision, *precision_of.values()):
        if value not in PRECISIONS:
            raise UsageError(f"precision {value!r}: choose one of {', '.join(PRECISIONS)}")
        if value in FORMATS and flavour not in ACCURACY_LEVEL:
            raise UsageError(
                f"precision {value} is not supported yet in the flavour {flavour}: use fp16 or bf16, or the "
                "flavour ort or cuda"
            )
        if value == "bf16" and flavour == "ort":
            raise UsageError("precision bf16 runs on GPUs: choose the flavour cuda or portable, or fp16")


def choose(precision: str, precision_of: Mapping[str, str], graphs: Mapping[str, Any]) -> dict[str, str]:
    """The precision of each graph. Raises UsageError for the name of a graph that the model lacks."""
    for name in precision_of:
        if name not in graphs:
            raise UsageError(f"precision of {name!r}: this model has no such graph: {nearest(name, graphs)}")
    return {name: precision_of.get(name, precision) for name in graphs}


def activations(precisions: Mapping[str, str], flavour: str) -> dict[str, str]:
    """The precision of what is not packed: in the flavour cuda, graphs of 8 and 4 bits are otherwise float16."""
    return {name: "fp16" if flavour == "cuda" and p in FORMATS else p for name, p in precisions.items()}


def form_of(precision: str, flavour: str) -> Format:
    return (DEVICE_FORMATS if flavour == "cuda" else FORMATS)[precision]


def run(model: ir.Model, precision: str, flavour: str = "ort") -> Outcome:
    """Pack the matrices of one graph; "fp32" changes nothing."""
    if precision not in FORMATS:
        return Outcome()
    form = form_of(precision, flavour)
    packed: dict[ir.Value, Packed] = {}
    kept: dict[ir.Value, str] = {}
    for node in nodes(model, "MatMul"):
        weight = required(node.inputs[1])
        tensor = weight.const_value if weight.is_initializer() else None
        if tensor is None or len(tensor.shape) != 2 or tensor.dtype is not ir.DataType.FLOAT:
            continue
        inputs = int(tensor.shape.numpy()[0])
        if inputs % form.block:
            kept[weight] = f"{weight.name}: {inputs} inputs are no multiple of {form.block}"
            continue
        packed.setdefault(weight, Packed(str(weight.name), tensor, form))
        _replace(model.graph, node, packed[weight], ACCURACY_LEVEL[flavour])
    for weight in packed:
        if not weight.uses():
            model.graph.initializers.pop(str(weight.name))
    if packed:
        model.graph.opset_imports[DOMAIN] = 1
    return Outcome(tuple(packed.values()), tuple(kept.values()))


def read_error(path: Path, packed: tuple[Packed, ...]) -> float:
    """The largest error of a written graph's codes against the float weights: `blockwise.block_error`."""
    written = ir.load(path).graph.initializers
    worst = 0.0
    for weight in packed:
        codes, scales, zeros = (None if name is None else _written(written, name) for name in weight.names())
        assert codes is not None and scales is not None  # noqa: PT018
        got_NK = dequantise(Blocks(codes, scales, zeros), weight.form)
        worst = max(worst, block_error(got_NK, weight.floats(), weight.form.block))
    return worst


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


def _initializers(graph: ir.Graph, weight: Packed, n: int, k: int) -> list[ir.Value]:
    form, blocks = weight.form, k // weight.form.block
    names, once = weight.names(), _Once(weight)
    made = [
        _lazy(graph, names[0], ir.DataType.UINT8, (n, blocks, form.block * form.bits // 8), lambda: once.array(0)),
        _lazy(graph, names[1], ir.DataType.FLOAT, (n, blocks), lambda: once.array(1)),
    ]
    if names[2] is not None:
        sizes = (n, -(-blocks * form.bits // 8))
        made.append(_lazy(graph, names[2], ir.DataType.UINT8, sizes, lambda: once.array(2)))
    return made


class _Once:
    """The arrays of a packed weight: all computed at the first call, each released when it is returned."""

    def __init__(self, weight: Packed) -> None:
        self._weight = weight
        self._arrays: dict[int, Any] = {}

    def array(self, index: int) -> Any:
        if index not in self._arrays:
            blocks = quantise(self._weight.floats(), self._weight.form)
            self._arrays = dict(enumerate((blocks.codes, blocks.scales, blocks.zeros)))
        return self._arrays.pop(index)


def _lazy(
    graph: ir.Graph, name: str, dtype: ir.DataType, sizes: tuple[int, ...], compute: Callable[[], Any]
) -> ir.Value:
    if name not in graph.initializers:
        shape = ir.Shape(sizes)
        lazy = ir.LazyTensor(lambda: ir.Tensor(compute(), name=name), dtype=dtype, shape=shape, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=lazy)
        graph.register_initializer(value)
    return graph.initializers[name]


def _array(value: ir.Value) -> Any:
    assert value.const_value is not None
    return value.const_value.numpy()
