"""`blt export --triton` with an existing bundle, and options that do not fit (test_models exports a checkpoint)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.calls import PATHS, WITHOUT_TORCH
from tests.triton import fake

Call = Callable[..., Any]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return fake.bundle(tmp_path / "small")


def test_a_bundle_becomes_a_model_without_torch(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", PATHS)
    command = [sys.executable, "-c", WITHOUT_TORCH, "export", str(bundle), "--triton", str(tmp_path / "models")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/models/small: a model of Triton's Python backend\n"
    assert (tmp_path / "models/small/config.pbtxt").is_file()


def test_the_json_of_a_bundle_names_both_folders(blt: Call, bundle: Path, tmp_path: Path) -> None:
    done = blt("export", bundle, "--triton", tmp_path / "models", "--no-copy", "--json")
    found = json.loads(done.out)
    assert found == {"schema": "blt.export/2", "bundle": str(bundle), "triton": str(tmp_path / "models/small")}


WRONG: dict[str, tuple[str, str]] = {
    "a bundle alone": ("{bundle}", "or --triton DIR"),
    "an option of the export": ("{bundle} --triton {tmp}/models --precision int8", "--precision has no effect"),
    "another bundle": ("{bundle} --triton {tmp}/models -o {tmp}/new", "--out has no effect"),
    "no folder for the bundle": ("{model} --triton {tmp}/models", "-o DIR is missing"),
    "a name without Triton": ("{model} -o {tmp}/new --served-model-name x", "no effect without --triton"),
    "no copy without Triton": ("{model} -o {tmp}/new --no-copy", "no effect without --triton"),
    "a name with a slash": (
        "{model} -o {tmp}/new --triton {tmp}/models --served-model-name a/b",
        "cannot name a model",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused_before_the_export(blt: Call, bundle: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "model.pt").write_bytes(b"never read")
    line, message = WRONG[name]
    done = blt("export", *line.format(bundle=bundle, model=tmp_path / "model.pt", tmp=tmp_path).split())
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "models").exists()
    assert not (tmp_path / "new").exists()
