"""benchmarks/gpu.py: without a GPU each stage says why it did not run; packed bundles get weights of the right size."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from blt_export import pipeline
from blt_runtime import Model
from tests import engines
from tests.exports import prepare

REPO = Path(__file__).parents[2]


@pytest.fixture
def gpu(benchmark: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = benchmark("gpu")
    monkeypatch.setattr(module, "PROMPT", 48)
    monkeypatch.setattr(module, "NEW", 8)
    monkeypatch.setattr(module, "ROWS", 2)
    return module


def arguments(out: Path, *bundles: Path, real: tuple[Path, ...] = ()) -> argparse.Namespace:
    return argparse.Namespace(out=out, bundle=list(bundles), real=list(real), provider="cpu")


def test_a_packed_bundle_opens_with_random_weights(benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    gpu = benchmark("gpu")
    made = pipeline.run(
        prepare("hash_entropy", "cuda", precision="fp16", capacity=64, check=False), tmp_path / "bundle"
    )
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
    assert len(results) == 10
    assert all("not run" in result for result in results.values())
    assert "no NVIDIA GPU" in (tmp_path / "report.md").read_text()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(first.stdout.splitlines()) == 11
    assert again.stdout.splitlines() == [str(tmp_path / "report.md")]


def test_the_stages_of_onnxruntime_run_on_the_cpu(gpu: ModuleType, tmp_path: Path) -> None:
    """What they measure there is no answer, but no stage meets its code for the first time on a GPU."""
    state = prepare(engines.VARIANT, "cuda", precision="fp16", capacity=192, check=False)
    bundle = pipeline.run(state, tmp_path / "bundle").path
    gpu.pack(bundle, tmp_path / "packed")
    given = arguments(tmp_path, bundle, real=(tmp_path / "packed",))
    found = gpu.bundles(given)["bundle"]
    assert found["launched: bytes/s"] > 0
    assert found["launched: us of decoder"] > 0
    assert found["boundaries moved"] == found["entropies: largest difference"] == 0 < found["boundaries"]
    assert set(gpu.real(given)["real-packed"]) == {key for key in found if key.startswith("launched")}
    drafts = gpu.speculation(given)["bundle"]
    assert drafts["speculate lookup: bytes/s"] > 0
    assert set(gpu.rows(given)["tables: host"]) == {f"bytes/s of {streams}" for streams in (1, 8, 64)}


def test_the_stage_of_tensorrt_runs_on_the_stand_in(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blt_runtime.backends.platform.open_platform", engines.platform)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    bundle = engines.exported(tmp_path, precision="fp16").path
    found = gpu.engines(arguments(tmp_path, bundle))["bundle"]
    graphs = {"entropy", "encoder", "latent", "decoder"}
    assert set(found["seconds of building"]) == graphs | {f"{graph}.rows" for graph in graphs}
    assert found["us of a forked byte"] > 0
    assert found["batched"]["bytes/s of 2"] > 0
    assert found["us of entropy"] > 0
    assert {key for key in found if key.endswith("bytes/s")} == {
        "forked: bytes/s",
        "in order: bytes/s",
        "speculate off: bytes/s",
        "speculate lookup: bytes/s",
        "speculate auto: bytes/s",
    }
    again = gpu.engines(arguments(tmp_path, bundle))["bundle"]  # the same engines
    assert "seconds of building" not in again
    assert again["in order: bytes/s"] > 0
