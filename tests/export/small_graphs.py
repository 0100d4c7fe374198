"""Graphs of a few nodes for the tests of single passes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from blt_export.rewrite import Builder

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


def weight(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    initializer = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(F), const_value=ir.tensor(array))
    model.graph.register_initializer(initializer)
    return initializer
