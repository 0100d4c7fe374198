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
    assert "give -n 626 or less, add --overflow slide, or export with a larger --capacity" in full.err
    assert full.out == b""
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


def test_a_length_that_cannot_fit_fails_before_anything_is_generated(blt: Call, model: Path) -> None:
    for size in ("1G", "627"):
        full = blt("generate", model, "The beginning", "-n", size)
        assert (full.code, full.out) == (1, b"")
        assert "give -n 626 or less" in full.err
    assert blt("generate", model, "The beginning", "-n", "626", "--ignore-eos").code == 0


@pytest.fixture(scope="module")
def few_patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from blt_export import export

    path = tmp_path_factory.mktemp("few") / "bundle"
    export(tiny("static"), path, capacity=64, patches=4, check=False)
    return path


@pytest.mark.parametrize(
    "command",
    [
        "generate {m} - -n 1",
        "score {m} - --npz {tmp}/o.npz",
        "bench patch {m} --prompt-bytes 80",
    ],
)
def test_a_full_stream_names_options_of_the_command_line(
    blt: Call, few_patches: Path, command: str, tmp_path: Path
) -> None:
    """The runtime's methods, such as reset(), are no advice to a user of the command line."""
    words = [word.format(m=few_patches, tmp=tmp_path) for word in command.split()]
    for size in (50, 80):  # too many patches, too many bytes
        full = blt(*words, stdin=b"x" * size)
        assert full.code == 1
        assert "export with a larger --capacity" in full.err or "export with a larger --patches" in full.err
        assert "reset" not in full.err
        assert ("--overflow slide" in full.err) == (words[0] == "generate")
        assert full.out == b""


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
