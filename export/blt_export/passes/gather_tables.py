"""Hash embeddings in the graph, for hash tables in memory of a device.

On the host, a hash embedding takes 14 us a byte, one row of the batch after another. In the graph all rows gather at
once, and only row numbers are copied to the device.

Rule: the input hash_embedding [B, S, D] becomes the sum over T of hash_tables[hash_rows], with the inputs hash_rows
int64 [B, S, T] and hash_tables [T * rows, D] in the type of the stored tables. Sums are float32, as on the host.

Requires: the batched graph of the encoder. Ensures: the interface of `spec.table_spec`; weights have the names and file
offsets of the original graph's.
"""

from __future__ import annotations

import onnx_ir as ir

from blt_runtime.bundle.spec import GraphSpec

from ..rewrite import Builder
from .keep_states import new_input


def run(model: ir.Model, wanted: GraphSpec) -> ir.Model:
    """A copy of the graph with the interface `wanted`; initializers are shared with `model`."""
    made = model.clone()
    graph = made.graph
    inputs = {str(value.name): value for value in graph.inputs}
    rows, tables = (new_input(wanted.tensor(name)) for name in ("hash_rows", "hash_tables"))
    b, old = Builder(graph, graph[0]), inputs.pop("hash_embedding")
    found = b.op("Gather", tables, rows, axis=0)
    if tables.dtype is not ir.DataType.FLOAT:
        found = b.op("Cast", found, to=ir.DataType.FLOAT)
    total = b.op("ReduceSum", found, b.const([2]), keepdims=0, dtype=ir.DataType.FLOAT)
    total.shape = old.shape
    ir.convenience.replace_all_uses_with(old, total)
    inputs |= {"hash_rows": rows, "hash_tables": tables}
    graph.inputs.clear()
    graph.inputs.extend(inputs[tensor.name] for tensor in wanted.inputs)
    return made
