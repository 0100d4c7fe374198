"""Graphs as files: `name.onnx` and its weights. No PyTorch."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

_PAGE = 4096
_INLINE = 1024
"""Bytes below which an initializer stays in the .onnx file: shape constants, not weights."""


def write_graph(model: ir.Model, folder: Path, name: str) -> Path:
    """`name.onnx` and, with its larger initializers, `name.weights`."""
    remove_notes(model)
    path = folder / f"{name}.onnx"
    ir.save(
        model,
        path,
        external_data=f"{name}.weights",
        size_threshold_bytes=_INLINE,
        alignment=_PAGE,
        align_threshold=_PAGE,
    )
    return path


def remove_notes(model: ir.Model) -> None:
    """Remove what PyTorch's exporter notes on each node, such as stack traces with the paths of this machine."""
    values = (*model.graph.inputs, *(value for node in model.graph for value in node.outputs))
    for noted in (model, model.graph, *model.graph, *values, *model.graph.initializers.values()):
        noted.metadata_props.clear()
        noted.doc_string = None


def write_variant(model: ir.Model, folder: Path, name: str, variant: str) -> Path:
    """`name.variant.onnx`; its initializers are in `name.weights` already."""
    path = folder / f"{name}.{variant}.onnx"
    ir.save(model, path)
    return path
