"""What the tests of the JavaScript runtime share: prompts, bundles, and the results of the Python runtime."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from filelock import FileLock

from blt.checkpoint.models import Checkpoint, load
from blt_export import pipeline
from blt_runtime import Model
from blt_runtime.ids import BOS, EOS, encode
from tests import exports
from tests.tiny import hard_text

REPO = Path(__file__).resolve().parents[2]
MODULE = REPO / "runtime" / "js" / "blt.js"
PACKAGES = MODULE.parent / "node_modules"
DRIVER = Path(__file__).parent

PROMPTS: dict[str, str | bytes] = {
    "empty": "",
    "English": "The history of",
    "German": "Es war einmal in Lübeck ein Bäcker, der",
    "French": "Où est passé le garçon à l'étage ?",
    "Polish": "Zażółć gęślą jaźń",
    "Russian": "Жили-были старик со старухой",
    "Greek": "Στην αρχή ήταν",
    "Arabic": "كان يا ما كان",
    "Hindi": "एक समय की बात है",
    "Chinese": "从前有一座山，山里有座庙",
    "Japanese": "昔々、あるところに",
    "emoji": "🚀🧪👩‍🔬 go",
    "Python": "def mean(values):\n    return sum(values) /",
    "JSON": '{"name": "blt", "sizes": [1, 2, ',
    "no UTF-8": b"\x80\xff\x00\n\xc3(",
}
"""Prompts of fifteen kinds."""


@dataclass(frozen=True)
class Case:
    """Ids to append to an empty stream, how many to generate after them, and how: greedily if nothing is said."""

    ids: tuple[int, ...]
    n: int
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        names = {"top_k": "topK", "top_p": "topP", "min_p": "minP"}
        options = {names.get(name, name): value for name, value in self.sampling.items()}
        return {"ids": list(self.ids), "n": self.n, "options": options}


DEMO_CASES = tuple(Case(tuple(encode(prompt).tolist()), 40) for prompt in PROMPTS.values())
TINY_CASES = (
    Case((BOS,), 40),
    Case(tuple(hard_text().tolist()), 40),  # documents, longer than all windows
    Case((*hard_text()[:70].tolist(), EOS, BOS, *encode("x\n\ny", bos=False).tolist()), 20),
)


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of one run share."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "js-bundles"
    folder.mkdir(exist_ok=True)
    return folder


def demo_bundle(folder: Path, precision: str = "fp32") -> Path:
    """The shipped model's bundle."""
    path = folder / f"demo-{precision}"
    with FileLock(folder / "lock"):
        if not path.exists():
            state = pipeline.prepare(_demo_checkpoint(), "ort", precision=precision, check=False)
            state.captured = _DEMO_CAPTURED
            pipeline.run(state, path)
    return path


@functools.cache
def _demo_checkpoint() -> Checkpoint:
    return load(REPO / "configs" / "demo" / "model.pt", generates=True)


_DEMO_CAPTURED: dict[str, ir.Model] = {}


def tiny_bundle(folder: Path, variant: str, flavour: str, table_dtype: str) -> Path:
    """A bundle of one of the tiny variants."""
    path = folder / f"{variant}-{flavour}-{table_dtype}"
    with FileLock(folder / "lock"):
        if not path.exists():
            pipeline.run(exports.prepare(variant, flavour, check=False, table_dtype=table_dtype), path)
    return path


def with_spec(bundle: Path, name: str, **changes: Any) -> Path:
    """A copy of a bundle whose manifest has other values in its spec."""
    folder = bundle.parent / f"{bundle.name}-{name}"
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["spec"] |= changes
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def with_rule(bundle: Path, name: str, **changes: Any) -> Path:
    """A copy of a bundle whose manifest has another patch rule."""
    rule = json.loads((bundle / "manifest.json").read_text())["spec"]["patch_rule"]
    return with_spec(bundle, name, patch_rule=rule | changes)


def expected(bundle: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """What the Python runtime generates: ids, patch lengths and entropies."""
    model, found = Model.open(bundle, threads=1), []
    for case in cases:
        stream = model.stream(bos=False)
        stream.append_ids(list(case.ids))
        ids = list(stream.generate_ids(case.n, **{"temperature": 0.0, **case.sampling}, stop_at_eos=False))
        entropies = stream._memory.entropies.array[0, : stream.position]
        found.append({"ids": ids, "patch_lengths": stream.patch_lengths.tolist(), "entropies": entropies})
    return found


def assert_equal(found: list[dict[str, Any]] | str, wanted: list[dict[str, Any]]) -> None:
    """The same ids and patches, and the same entropies but for rounding."""
    assert not isinstance(found, str), found
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine["ids"] == theirs["ids"]
        assert mine["patch_lengths"] == theirs["patch_lengths"]
        entropies = np.array([np.nan if value is None else value for value in mine["entropies"]], np.float32)
        np.testing.assert_allclose(entropies, theirs["entropies"], atol=2e-4)


def demand_packages(*names: str) -> None:
    """Skips the module unless node and its packages are installed."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed", allow_module_level=True)
    missing = [name for name in names if not (PACKAGES / name).is_dir()]
    if missing:
        command = "npm ci --prefix runtime/js --ignore-scripts"
        pytest.skip(f"{', '.join(missing)} is not installed: {command}", allow_module_level=True)
