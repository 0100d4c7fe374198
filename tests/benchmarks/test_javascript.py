"""benchmarks/javascript.py: what it compares draws the same bytes. Nothing is timed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir
import pytest

from blt_export import pipeline
from tests import exports


@pytest.fixture(scope="module")
def javascript(benchmark: Any) -> ModuleType:
    module: ModuleType = benchmark("javascript")
    return module


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    bundle = tmp_path_factory.mktemp("bundles") / "tiny"
    pipeline.run(exports.prepare("plain", check=False), bundle)
    return {"bundle": str(bundle), "prompts": ["ab", "of the text " * 9], "bytes": 9, "runs": 1}


def test_a_copy_with_full_caches_draws_the_same_bytes(
    javascript: ModuleType, job: dict[str, Any], tmp_path: Path
) -> None:
    copy = javascript.with_full_caches(Path(job["bundle"]), tmp_path)
    inputs = ir.load(copy / "latent.onnx").graph.inputs
    sizes = {str(value.shape[2]) for value in inputs if value.shape is not None and "past" in str(value.name)}
    assert sizes == {str(exports.CAPACITY)}
    assert javascript.in_python({**job, "bundle": str(copy)})["texts"] == javascript.in_python(job)["texts"]


def test_node_draws_the_bytes_of_python(javascript: ModuleType, job: dict[str, Any]) -> None:
    if shutil.which("node") is None or not (javascript.PACKAGES / "onnxruntime-node").is_dir():
        pytest.skip("onnxruntime-node is not installed: npm ci --prefix runtime/js --ignore-scripts")
    found, wanted = javascript.in_node(javascript.NODE, job), javascript.in_python(job)
    assert found["texts"] == wanted["texts"]
    assert [[len(seconds) for seconds in found[key]] for key in ("reading", "writing")] == [[1, 1], [1, 1]]
