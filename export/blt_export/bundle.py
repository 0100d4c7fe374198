"""The bundle on disk: graphs and their weights, hash tables, manifest. It is written completely or not at all.

manifest.json
entropy.onnx  entropy.weights      one pair per graph; weights at page-aligned offsets, so that they can be mapped
entropy.rows.onnx                  the batched graph, on the same weights
encoder.tables.onnx                the batched encoder that gathers from hash tables in memory of a device
entropy.device.onnx                the graph that keeps byte states and patch vectors, on the same weights
hash_tables.npy                    [tables * rows, stored width], written a block of rows at a time
entropy_tables.npy                 the same of an entropy model with hash n-grams
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from blt import files
from blt.checkpoint.tensors import StoredTensor, cast, raw_bytes
from blt_runtime.bundle.bundle import entry_of, is_bundle
from blt_runtime.bundle.manifest import FileEntry
from blt_runtime.hashing import TABLE_DTYPES, TableDtype, stored_width

from .graph_files import write_graph, write_variant
from .quantize.table_rows import quantise_rows

__all__ = ["HASH_TABLES", "check_target", "entries", "staged", "write_graph", "write_hash_tables", "write_variant"]
HASH_TABLES = {"encoder": "hash_tables.npy", "entropy": "entropy_tables.npy"}
"""Files by graph."""


def check_target(out: Path, force: bool) -> None:
    """Raises UsageError if `out` holds something that must not be replaced."""
    files.check_target(out, force, "a bundle", is_bundle)


@contextlib.contextmanager
def staged(out: Path, force: bool) -> Iterator[Path]:
    """A folder next to `out` that becomes `out` when the block ends, and is removed if the block raises.

    An older bundle is replaced with everything in its folder. Raises UsageError if `out` holds something that must not
    be replaced.
    """
    check_target(out, force)
    with files.staged(out) as work:
        yield work


def write_hash_tables(tables: StoredTensor, path: Path, dtype: TableDtype) -> Path:
    """Write the rows block by block: tables of a mapped checkpoint may be larger than memory."""
    rows, dim = tables.shape
    shape = (rows, stored_width(dim, dtype))
    header = {"descr": TABLE_DTYPES[dtype].str, "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in tables.blocks():
            file.write(_stored_rows(block, dtype, tables.names[0]))
    return path


def _stored_rows(block_ND: torch.Tensor, dtype: TableDtype, name: str) -> memoryview:
    if dtype != "int8":
        return raw_bytes(cast(block_ND, getattr(torch, dtype), name))
    return quantise_rows(cast(block_ND, torch.float32, name).numpy()).data


def entries(folder: Path) -> dict[str, FileEntry]:
    """Size and sha256 of every file in the folder."""
    return {path.name: entry_of(path) for path in sorted(folder.iterdir())}
