"""Graphs of a few nodes for the tests of single passes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from blt_export.rewrite import Builder

CONTRIB = "com.microsoft"
F, INT = ir.DataType.FLOAT, ir.DataType.INT64


def value(name: str, *shape: int | str, dtype: ir.DataType = F) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(dtype))


def model_of(inputs: list[ir.Value]) -> tuple[ir.Model, Builder]:
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 24}, name="g")
    return ir.Model(graph, ir_version=11), Builder(graph, None)


def finish(model: ir.Model, *outputs: ir.Value) -> None:
    model.graph.outputs.extend(outputs)


def run(model: ir.Model, **inputs: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, inputs)


def constant(value: ir.Value | None) -> np.ndarray:
    """The array of a constant value."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def has_constant_weight(node: ir.Node) -> bool:
    """True if the second input, which must exist, is a constant."""
    value = node.inputs[1]
    assert value is not None
    return value.const_value is not None


def dims(value: ir.Value) -> list[int | str | None]:
    """The shape of a value, which must have one: numbers and the names of symbolic dimensions."""
    assert value.shape is not None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def weight(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    initializer = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(F), const_value=ir.tensor(array))
    model.graph.register_initializer(initializer)
    return initializer


def rotated(packed: bool, size: int) -> tuple[ir.Model, str]:
    """qkv [B, S, (4 + 2 + 2) K] cut, rotated and attended to. Not packed: the values are the output of another node."""
    int32 = ir.DataType.INT32
    cache: list[int | str] = ["B", 2, 32, size]
    model, b = model_of([value("qkv", "B", "S", 8 * size), value("positions", "B", "S", dtype=INT),
                         value("last", "B", dtype=int32), value("total", dtype=int32),
                         value("key", *cache), value("value", *cache)])  # fmt: skip
    model.graph.opset_imports[CONTRIB] = 1
    qkv, positions, last, total, key, held = model.graph.inputs
    angle = np.arange(512)[:, None] * np.logspace(0, -2, size // 2)
    tables = [weight(model, n, f(angle).astype(np.float32)) for n, f in (("cos", np.cos), ("sin", np.sin))]
    rows = [b.op("Gather", table, positions, axis=0) for table in tables]
    q, k, v = b.op("Split", qkv, b.const([4 * size, 2 * size, 2 * size]), outputs=3, axis=-1)
    v = v if packed else b.op("Neg", v)
    q, k = (b.op("RotaryEmbedding", x, *rows, interleaved=1, num_heads=n) for x, n in ((q, 4), (k, 2)))
    outputs = b.op("GroupQueryAttention", q, k, v, key, held, last, total, domain=CONTRIB, outputs=3, num_heads=4,
                   kv_num_heads=2, do_rotary=0)  # fmt: skip
    for output, shape in zip(outputs, ([*cache[:1], "S", 4 * size], cache, cache), strict=True):
        output.dtype, output.shape = F, ir.Shape(list(shape))
    finish(model, *outputs)
    return model, "GroupQueryAttention"
