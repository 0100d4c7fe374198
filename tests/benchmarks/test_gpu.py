"""benchmarks/gpu.py: without a GPU each stage says why it did not run; packed bundles get weights of the right size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from blt_export import pipeline
from blt_runtime import Model
from tests.exports import prepare

REPO = Path(__file__).parents[2]


def test_a_packed_bundle_opens_with_random_weights(benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    gpu = benchmark("gpu")
    made = pipeline.run(prepare("plain", "cuda", precision="fp16", capacity=64, check=False), tmp_path / "bundle")
    gpu.pack(made.path, tmp_path / "packed")
    assert not list((tmp_path / "packed").glob("*.weights"))
    gpu.unpack(tmp_path / "packed", tmp_path / "real")
    stream = Model.open(tmp_path / "real", verify="sizes").stream()
    stream.append("abc")
    assert len(b"".join(stream.generate(8, temperature=0.0, stop_at_eos=False))) == 8


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is an NVIDIA GPU: benchmarks/gpu.py measures it")
def test_stages_that_cannot_run_say_why_and_are_not_run_again(tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "benchmarks/gpu.py"), "run", "-o", str(tmp_path), "--minutes", "5"]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 8
    assert all("not run" in result for result in results.values())
    assert "no NVIDIA GPU" in (tmp_path / "report.md").read_text()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(first.stdout.splitlines()) == 9
    assert again.stdout.splitlines() == [str(tmp_path / "report.md")]
