"""A tiny bundle for tests: the manifest is real, the graphs are arbitrary bytes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from blt_runtime.backends.null import null_spec
from blt_runtime.bundle import manifest as manifests
from blt_runtime.bundle.bundle import entry_of
from blt_runtime.bundle.manifest import FileEntry, FileRef, Manifest, Parity
from blt_runtime.bundle.spec import HashSpec, ModelSpec
from blt_runtime.hashing import TABLE_DTYPES, TableDtype, stored_width

HASH = HashSpec((3, 4), 1, 50, 4)


def stored(values: np.ndarray, dtype: TableDtype) -> np.ndarray:
    """Values in a table's stored type, exactly. For bfloat16 they must fit its eight bits of precision, for int8 they
    must be whole numbers up to 127 (the scale is 1)."""
    if dtype == "int8":
        scale = np.ones((len(values), 1), "<f4").view(np.int8)
        return np.concatenate([values.astype(np.int8), scale], 1)
    if dtype != "bfloat16":
        return values.astype(TABLE_DTYPES[dtype])
    bits = values.astype(np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def write_bundle(
    folder: Path,
    spec: ModelSpec | None = None,
    graphs: dict[str, bytes] | None = None,
    dtype: TableDtype = "float32",
    empty_tables: bool = False,
) -> Manifest:
    """Writes a complete bundle for `spec` (default: the null model with hash tables) and returns its manifest.

    empty_tables: zeros without disk space or a checksum.
    """
    spec = spec or null_spec(hash=replace(HASH, dtype=dtype))
    folder.mkdir(parents=True, exist_ok=True)
    names = {name: f"{name}.onnx" for name in spec.graphs}
    for name, file in names.items():
        (folder / file).write_bytes((graphs or {}).get(name, f"graph {name}".encode()))
    listed = [*names.values()]
    tables = {name: f"{'hash' if name == 'encoder' else name}_tables.npy" for name in spec.hashes}
    for name, hash in spec.hashes.items():
        _write_tables(folder / tables[name], hash, empty_tables)
        listed.append(tables[name])
    manifest = Manifest(
        producer={"blt": "0.1.0"},
        flavour="ort",
        precision="fp32",
        opset=24,
        min_onnxruntime="1.30",
        config={"blt": {"dim": 4}},
        spec=spec,
        graphs={name: FileRef(file) for name, file in names.items()},
        hash_tables=FileRef(tables["encoder"]) if "encoder" in tables else None,
        entropy_tables=FileRef(tables["entropy"]) if "entropy" in tables else None,
        files={name: _entry(folder / name, empty_tables) for name in listed},
        parity=(Parity("logits", 1e-7, 1e-5, 64),),
    )
    manifests.write(folder / manifests.FILE_NAME, manifest)
    return manifest


def _write_tables(path: Path, hash: HashSpec, empty: bool) -> None:
    shape = (hash.tables * hash.rows, hash.dim)
    if empty:
        shape = (shape[0], stored_width(hash.dim, hash.dtype))
        np.lib.format.open_memmap(path, "w+", TABLE_DTYPES[hash.dtype], shape)
    else:
        np.save(path, stored(np.random.default_rng(0).integers(0, 9, shape), hash.dtype))


def _entry(path: Path, empty: bool) -> FileEntry:
    return FileEntry(path.stat().st_size, "") if empty and path.suffix == ".npy" else entry_of(path)


def edit(folder: Path, **changes: Any) -> None:
    """Overwrites top-level keys of a bundle's manifest; a value of None under `drop` names keys to remove."""
    path = folder / manifests.FILE_NAME
    data = json.loads(path.read_text())
    for key in changes.pop("drop", ()):
        del data[key]
    data.update(changes)
    path.write_text(json.dumps(data))


def hub_cache(folder: Path, inside: str = "") -> Path:
    """The bundle as the Hugging Face cache stores it: every file is a link into `blobs`. Returns the snapshot."""
    repository = folder.parent / "models--a--b"
    snapshot = repository / "snapshots" / "rev" / inside
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = path.rename(repository / "blobs" / f"{number:040x}")
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot
