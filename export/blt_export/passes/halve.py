"""Half precision: float16 or bfloat16 instead of float32.

Half are matrices, embeddings, norm weights, rotary tables, caches, byte states, patch vectors and everything computed
from them. Kernels add up norms, products and softmax in float32. Of the interface, integers, hash_embedding, entropy
and logits keep their types: the host computes hash embeddings in float32 and samples from float32 logits.

Rules
1. A node with a half input is half. Its constants become half; its other float32 inputs are cast. Constants alone
   (embeddings that are gathered) are half.
2. The output logits is cast to float32, and the entropy is computed from it in float32: CUDA has no bfloat16 kernels of
   LogSoftmax and ReduceMax.
3. A float32 value that is cast from integers or booleans is cast to half at once where a half node reads it.

Constants are converted when the file is written (lazy tensors), so only one float weight is in memory at a time.

Requires: a lowered graph. Ensures: the types of `half_spec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace as changed
from typing import Literal

import onnx_ir as ir

from blt_runtime.bundle.spec import GraphSpec, ModelSpec, TensorSpec
from blt_runtime.errors import UsageError

from ..rewrite import Builder, integer, lazy_initializer, node_after, required

HALVES = {"fp16": ("float16", ir.DataType.FLOAT16), "bf16": ("bfloat16", ir.DataType.BFLOAT16)}
"""Precision: the type's name in a specification, and in ONNX."""
KEPT = frozenset(("hash_embedding", "entropy", "logits"))
"""Tensors of the interface that stay float32."""
_NOT_FLOAT = frozenset(("And", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Shape"))
Kind = Literal["half", "float", "constant", "other"]


def half_spec(spec: ModelSpec, precisions: Mapping[str, str]) -> ModelSpec:
    """The specification with half caches, byte states and patch vectors. Raises UsageError unless encoder, latent
    transformer and decoder, which pass them to each other, have the same half precision or none."""
    named = {precisions.get(name, "") for name in ("encoder", "latent", "decoder")}
    if len(named) > 1 and named & set(HALVES):
        raise UsageError(
            "encoder, latent and decoder pass half-precision vectors to each other: give all three the same precision"
        )
    graphs = {
        name: _half_graph(graph, HALVES[precisions[name]][0]) if precisions.get(name) in HALVES else graph
        for name, graph in spec.graphs.items()
    }
    return changed(spec, graphs=graphs)


def _half_graph(graph: GraphSpec, dtype: str) -> GraphSpec:
    def tensor(of: TensorSpec) -> TensorSpec:
        return of if of.dtype != "float32" or of.name in KEPT else changed(of, dtype=dtype)

    return changed(graph, inputs=tuple(map(tensor, graph.inputs)), outputs=tuple(map(tensor, graph.outputs)))


def run(model: ir.Model, precision: str) -> int:
    """Returns how many constants are half now. precision: "fp16" or "bf16"; others change nothing."""
    if precision not in HALVES:
        return 0
    return _Halving(model, HALVES[precision][1]).run()


class _Halving:
    def __init__(self, model: ir.Model, half: ir.DataType) -> None:
        self._model, self._graph, self._half = model, model.graph, half
        self._kinds: dict[ir.Value, Kind] = {}
        self._constants: dict[ir.Value, ir.Value] = {}
        self._casts: dict[ir.Value, ir.Value] = {}

    def run(self) -> int:
        for value in self._graph.inputs:
            self._set_input(value)
        for name in list(self._graph.initializers):
            value = self._graph.initializers[name]
            self._kinds[value] = "constant" if value.dtype is ir.DataType.FLOAT else "other"
        for node in list(self._graph):
            self._convert(node)
        for value in self._constants:
            if not value.uses():
                self._graph.initializers.pop(str(value.name))
        return len(self._constants)

    def _set_input(self, value: ir.Value) -> None:
        if value.dtype is not ir.DataType.FLOAT:
            self._kinds[value] = "other"
        elif value.name in KEPT:
            self._kinds[value] = "float"
        else:
            value.type, self._kinds[value] = ir.TensorType(self._half), "half"

    def _convert(self, node: ir.Node) -> None:
        kinds = {value: self._kinds[value] for value in node.inputs if value is not None}
        kind = self._kind(node, set(kinds.values()))
        if kind == "half":
            for index, value in enumerate(node.inputs):
                if value is not None and kinds[value] in ("constant", "float"):
                    node.replace_input_with(index, self._as_half(node, value, kinds[value]))
        for value in node.outputs:
            self._kinds[value] = kind
            if kind == "half":
                value.type = ir.TensorType(self._half)
                if value.is_graph_output() and value.name in KEPT:
                    self._keep_float(node, value)

    def _kind(self, node: ir.Node, of_inputs: set[Kind]) -> Kind:
        if node.op_type == "Cast":
            return "float" if integer(node, "to") == ir.DataType.FLOAT else "other"
        if node.op_type in _NOT_FLOAT or not of_inputs & {"half", "float", "constant"}:
            return "other"
        return "float" if "float" in of_inputs and "half" not in of_inputs else "half"

    def _as_half(self, node: ir.Node, value: ir.Value, kind: Kind) -> ir.Value:
        if kind == "constant":
            if value not in self._constants:
                self._constants[value] = self._half_constant(value)
            return self._constants[value]
        if value not in self._casts:
            producer = value.producer()
            source = required(producer.inputs[0]) if producer is not None and producer.op_type == "Cast" else value
            self._casts[value] = Builder(self._graph, node).op("Cast", source, to=self._half, dtype=self._half)
            self._casts[value].shape = value.shape
            self._kinds[self._casts[value]] = "half"
        return self._casts[value]

    def _half_constant(self, value: ir.Value) -> ir.Value:
        tensor, name, half = value.const_value, f"{value.name}.half", self._half
        assert tensor is not None
        shape = tensor.shape.numpy()
        made = lazy_initializer(self._graph, name, half, shape, lambda: tensor.numpy().astype(half.numpy()))
        self._kinds[made] = "half"
        return made

    def _keep_float(self, node: ir.Node, value: ir.Value) -> None:
        """The output becomes a Cast of what the node computes; other readers read it too."""
        name = value.name
        b = Builder(self._graph, node_after(self._graph, node))
        cast = b.op("Cast", value, to=ir.DataType.FLOAT, dtype=ir.DataType.FLOAT)
        cast.shape, self._kinds[cast] = value.shape, "float"
        for reader, index in list(value.uses()):
            if reader is not cast.producer():
                reader.replace_input_with(index, cast)
        self._graph.outputs[self._graph.outputs.index(value)] = cast
        value.name, cast.name = f"{name}.half", name
