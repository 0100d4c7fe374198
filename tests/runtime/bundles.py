"""A tiny bundle for tests: the manifest is real, the graphs are whatever bytes are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from blt_runtime import manifest as manifests
from blt_runtime.backends.null import null_spec
from blt_runtime.bundle import entry_of
from blt_runtime.manifest import FileRef, Manifest, Parity
from blt_runtime.spec import HashSpec, ModelSpec

HASH = HashSpec((3, 4), 1, 50, 4)


def write_bundle(
    folder: Path, spec: ModelSpec | None = None, graphs: dict[str, bytes] | None = None, dtype: str = "float32"
) -> Manifest:
    """Writes a complete bundle for `spec` (default: the do-nothing model with hash tables) and returns its manifest."""
    spec = spec or null_spec(hash=HASH)
    folder.mkdir(parents=True, exist_ok=True)
    names = {name: f"{name}.onnx" for name in spec.graphs}
    for name, file in names.items():
        (folder / file).write_bytes((graphs or {}).get(name, f"graph {name}".encode()))
    listed = [*names.values()]
    if spec.hash is not None:
        shape = (spec.hash.tables * spec.hash.rows, spec.hash.dim)
        np.save(folder / "hash_tables.npy", np.random.default_rng(0).integers(0, 9, shape).astype(dtype))
        listed.append("hash_tables.npy")
    manifest = Manifest(
        producer={"blt": "0.1.0"},
        flavour="ort",
        precision="fp32",
        opset=24,
        min_onnxruntime="1.30",
        config={"blt": {"dim": 4}},
        spec=spec,
        graphs={name: FileRef(file) for name, file in names.items()},
        hash_tables=FileRef("hash_tables.npy") if spec.hash else None,
        files={name: entry_of(folder / name) for name in listed},
        parity=(Parity("logits", 1e-7, 1e-5, 64),),
    )
    manifests.write(folder / manifests.FILE_NAME, manifest)
    return manifest


def edit(folder: Path, **changes: Any) -> None:
    """Overwrites top-level keys of a bundle's manifest; a value of None under `drop` names keys to remove."""
    path = folder / manifests.FILE_NAME
    data = json.loads(path.read_text())
    for key in changes.pop("drop", ()):
        del data[key]
    data.update(changes)
    path.write_text(json.dumps(data))
