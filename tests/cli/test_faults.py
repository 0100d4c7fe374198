"""`blt generate --overflow` and `blt bench --precision`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blt.checkpoint.models import save
from tests.runtime.bundles import write_bundle
from tests.tiny import tiny

Call = Callable[..., Any]
MORE = 700
"""Bytes; the tiny model holds 640."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save(path, tiny("static"))
    return path


def test_a_text_that_outgrows_the_model(blt: Call, model: Path) -> None:
    options = ["generate", model, "The beginning", "-n", MORE, "--temperature", 0, "--ignore-eos", "--json"]
    full = blt(*options)
    assert full.code == 1
    assert "640" in full.err
    assert len(full.err.splitlines()) == 1
    slid = blt(*options, "--overflow", "slide", "--stats")
    report = json.loads(slid.text)
    assert 600 < report["new_bytes"] <= MORE  # special ids have no bytes
    forgotten = report["forgotten_bytes"]
    assert 640 - 319 <= forgotten <= 640 - 319 + 3  # 639 fit after BOS; of 640 remain 319, less a cut character
    assert f"forgot the oldest {forgotten}" in slid.err
    short = blt("generate", model, "The beginning", "-n", 20, "--overflow", "slide", "--stats", "--json")
    assert json.loads(short.text)["forgotten_bytes"] == 0
    assert "forgot" not in short.err


def test_an_unknown_overflow_is_a_usage_error(blt: Call, model: Path) -> None:
    done = blt("generate", model, "x", "--overflow", "slied")
    assert done.code == 2
    assert "did you mean 'slide'" in done.err


@pytest.mark.parametrize("kind", ["latency", "patch"])
def test_a_precision_that_the_model_does_not_run_at(blt: Call, model: Path, tmp_path: Path, kind: str) -> None:
    write_bundle(tmp_path / "b")
    done = blt("bench", kind, tmp_path / "b", "--precision", "int8")
    assert done.code == 1
    assert "was exported at fp32, not int8: blt export" in done.err
    done = blt("bench", kind, model, "--precision", "int8")
    assert done.code == 2
    assert "is a checkpoint, which runs at fp32: blt export" in done.err


def test_the_precision_that_the_model_runs_at(blt: Call, model: Path) -> None:
    done = blt("bench", "patch", model, "--precision", "fp32", "--prompt-bytes", 40, "--repeat", 1, "--json")
    assert done.code == 0
    assert json.loads(done.text)["precision"] == "fp32"
