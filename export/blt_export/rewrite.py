"""Small tools of all passes: count operators, build nodes before an anchor, replace a node.

Passes work in place on an `onnx_ir.Model` and return how many places they changed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

Dim = int | str


def op_counts(model: ir.Model) -> Counter[str]:
    """How often each operator occurs, `domain.Op` outside the standard domain."""
    return Counter(op_name(node) for node in model.graph)


def op_name(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def diff(before: Counter[str], after: Counter[str]) -> str:
    """`-8 Transpose, +2 Attention`, or `nothing`."""
    changes = {name: after[name] - before[name] for name in sorted(before | after)}
    return ", ".join(f"{delta:+d} {name}" for name, delta in changes.items() if delta) or "nothing"


def nodes(model: ir.Model, op_type: str, domain: str = "") -> list[ir.Node]:
    return [n for n in model.graph if n.op_type == op_type and n.domain == domain]


def dims(value: ir.Value | None) -> list[Dim] | None:
    """The value's shape with symbolic sizes as strings; None if the rank or a size is unknown."""
    if value is None or value.shape is None:
        return None
    sizes: list[Dim] = []
    for d in value.shape:
        if isinstance(d, int):
            sizes.append(d)
        elif d.value is not None:
            sizes.append(str(d.value))
        else:
            return None
    return sizes


def static(value: ir.Value | None, axis: int) -> int:
    """A size that must be known at export, for example a head count. Raises ValueError if it is symbolic."""
    shape = dims(value)
    size = None if shape is None else shape[axis]
    if not isinstance(size, int):
        raise ValueError(f"size {axis} of {value!r} must be static")
    return size


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer or of a Constant node's output, else None."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def integer(node: ir.Node | None, attribute: str, default: int = 0) -> int:
    """An integer attribute of a node, or its default."""
    given = None if node is None else node.attributes.get(attribute)
    return default if given is None else given.as_int()


def required(value: ir.Value | None) -> ir.Value:
    """An input that the operator's schema requires. Raises ValueError if it is missing."""
    if value is None:
        raise ValueError("a required input is missing")
    return value


def node_after(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    """The next node of the graph; None after the last one."""
    nodes = list(graph)
    at = nodes.index(node) + 1
    return nodes[at] if at < len(nodes) else None


def lazy_initializer(
    graph: ir.Graph, name: str, dtype: ir.DataType, sizes: Sequence[int], compute: Callable[[], Any]
) -> ir.Value:
    """The initializer of that name. If there is none, one is made, whose array is computed when it is read."""
    if name not in graph.initializers:
        shape = ir.Shape(sizes)
        lazy = ir.LazyTensor(lambda: ir.Tensor(compute(), dtype=dtype, name=name), dtype=dtype, shape=shape, name=name)
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=lazy)
        graph.register_initializer(value)
    return graph.initializers[name]


class Builder:
    """Inserts nodes before `anchor` (with no anchor: at the end of the graph)."""

    def __init__(self, graph: ir.Graph, anchor: ir.Node | None) -> None:
        self.graph, self.anchor = graph, anchor

    def const(self, array: Any, dtype: Any = np.int64) -> ir.Value:
        """An initializer; equal small constants of one graph are the same value."""
        data = np.asarray(array, dtype)
        name = f"const_{data.dtype}_" + ("x".join(map(str, data.shape)) or "scalar") + "_" + _digest(data)
        if name not in self.graph.initializers:
            value = ir.Value(
                name=name,
                type=ir.TensorType(ir.DataType.from_numpy(data.dtype)),
                shape=ir.Shape(data.shape),
                const_value=ir.tensor(data, name=name),
            )
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        dtype: ir.DataType | None = None,
        shape: Sequence[Dim] | None = None,
        attributes: Mapping[str, int] | None = None,
        **more: Any,
    ) -> Any:
        """One node; returns its output, or a tuple of them when there are several."""
        node = ir.node(op_type, list(inputs), {**more, **(attributes or {})}, domain=domain, num_outputs=outputs)
        if self.anchor is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.anchor, node)
        if dtype is not None:
            node.outputs[0].dtype = dtype
        if shape is not None:
            node.outputs[0].shape = ir.Shape(list(shape))
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)


def _digest(data: np.ndarray) -> str:
    if data.size <= 4 and data.dtype.kind in "iub":
        return "_".join(str(x) for x in data.reshape(-1).tolist())
    return hashlib.sha256(data.tobytes()).hexdigest()[:12]


def replace(node: ir.Node, new: Iterable[ir.Value]) -> None:
    """Replace the node's outputs by `new` in every use (also as graph outputs), then remove the node."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    for old, value in zip(node.outputs, new, strict=True):
        if value.type is None:
            value.type = old.type
        if value.shape is None:
            value.shape = old.shape
        swap(old, value)
    graph.remove(node, safe=True)


def swap(old: ir.Value, new: ir.Value) -> None:
    """Replace `old` by `new` in every use; a graph output keeps its name."""
    was_output, name = old.is_graph_output(), old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    if was_output and name is not None:
        old.name = None
        new.name = name
