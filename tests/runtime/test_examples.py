"""The embedding example runs unchanged."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.bundles import write_bundle


def test_embed(repo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_bundle(tmp_path / "b")
    example = runpy.run_path(str(repo / "runtime" / "examples" / "embed.py"))
    example["main"](str(tmp_path / "b"), "Once", backend="null")
    captured = capfd.readouterr()
    assert " ids in " in captured.err
    assert captured.out


def test_embed_reports_errors_in_one_line(repo: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repo / "runtime" / "examples" / "embed.py"), str(tmp_path / "no"), "x"]
    environment = {"PYTHONPATH": str(repo / "runtime"), "PATH": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "no such folder" in result.stderr


def test_the_runtime_loads_no_framework(repo: Path) -> None:
    code = "import sys, blt_runtime; print(sorted({'torch', 'onnx', 'onnxruntime', 'blt'} & set(sys.modules)))"
    environment = {"PYTHONPATH": str(repo / "runtime"), "PATH": ""}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
