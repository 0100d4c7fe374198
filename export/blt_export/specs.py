"""Specifications of the exported graphs: those of `blt.model.graphs`, with the cache layout of the flavour.

portable    windowed layers: ring, slots addressed by absolute position; a call may span documents
cuda        windowed layers: a linear cache, restarted with each document; a call must stay within a document
ort         windowed layers: the evicting cache of GroupQueryAttention; a call must stay within a document
            (a graph with heads that the operator does not support keeps the ring)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from blt.checkpoint.models import Checkpoint
from blt.model.graphs import Limits, WindowLayout, check_memory, model_spec
from blt_runtime.bundle.spec import GraphSpec, ModelSpec
from blt_runtime.errors import UsageError
from blt_runtime.hashing import TableDtype

from .lower import ort

Flavour = Literal["ort", "cuda", "portable"]
FLAVOURS: tuple[Flavour, ...] = ("ort", "cuda", "portable")


def export_spec(
    checkpoint: Checkpoint,
    flavour: Flavour,
    *,
    capacity: int | None,
    patches: int | None,
    chunk: int,
    table_dtype: TableDtype | None = None,
) -> ModelSpec:
    """The graphs of a checkpoint in one flavour.

    capacity, patches: bytes and patches per stream (default: the trained lengths). chunk: most bytes per call.
    table_dtype: of the hash tables (default: as the checkpoint stores them).

    Raises CheckpointError if the checkpoint cannot generate, ConfigError for impossible sizes, OutOfMemory for a
    capacity beyond this machine's memory, UsageError for bfloat16 entropies and for a table_dtype without tables.
    """
    blt, rule = checkpoint.require_blt()
    if rule.entropy_dtype != "float32":
        raise UsageError(
            f"a bundle computes entropies in float32, not {rule.entropy_dtype}: "
            "`blt convert --to native --entropy-dtype float32` makes a checkpoint that can be exported"
        )
    entropy = checkpoint.entropy.config if checkpoint.entropy else None
    limits = Limits.of(blt.config, capacity=capacity, patches=patches, chunk=chunk)
    if table_dtype is not None and not checkpoint.hash_embeddings:
        raise UsageError(f"table_dtype {table_dtype}: this model has no hash tables; leave it out")
    dtypes = {name: table_dtype or hashed.stored_as for name, hashed in checkpoint.hash_embeddings.items()}
    if flavour == "portable":
        spec = model_spec(blt.config, entropy, rule, limits=limits, table_dtypes=dtypes)
        check_memory(spec)
        return spec
    layout: WindowLayout = "window" if flavour == "ort" else "linear"
    spec = model_spec(
        blt.config, entropy, rule, limits=limits, layout=layout, chunk_crosses_documents=False, table_dtypes=dtypes
    )
    check_memory(spec)
    if flavour == "cuda":
        unsupported = [name for name, graph in spec.graphs.items() if not ort.supports(graph)]
        if unsupported:
            raise UsageError(
                f"the flavour cuda needs heads of a size that is a multiple of 8, and {unsupported[0]} has others: "
                "export the flavour portable"
            )
        return spec
    return replace(spec, graphs={name: _ring_if_unsupported(graph) for name, graph in spec.graphs.items()})


def _ring_if_unsupported(graph: GraphSpec) -> GraphSpec:
    if graph.cache is None or graph.cache.kind != "window" or ort.supports(graph):
        return graph
    return replace(graph, cache=replace(graph.cache, kind="ring"))
