"""Files that would hang a command, or fill the memory or the terminal: each is one typed line, at once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blt.checkpoint.models import save
from tests.runtime.bundles import edit, write_bundle
from tests.tiny import tiny

Call = Callable[..., Any]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
pytestmark = pytest.mark.timeout(60)
NAMES = (
    "manifest.json",
    "model.pt",
    "config.json",
    "params.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
COMMANDS = (
    "generate {f} x",
    "inspect {f}",
    "eval {f} data",
    "check {f}",
    "patch x --model {f}",
    "score {f} data --npz out.npz",
    "export {f} -o out",
    "convert {f} -o out --to native",
    "bench patch {f}",
    "train entropy -c {configs}/demo-entropy.yaml --data {f} -o out",
    "train blt -c {configs}/demo.yaml --data {f} --entropy-model {f} -o out",
    "data info {f}",
    "plot {f} -o out.png",
)


def one_line(done: Any) -> str:
    lines = done.err.splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("blt: error: ")
    assert "Traceback" not in lines[0]
    assert "(-v shows the traceback)" not in lines[0]
    assert lines[0].isprintable()
    return str(lines[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_fifo_in_the_place_of_a_file(
    blt: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "f"
    folder.mkdir()
    if name.endswith("safetensors"):
        (folder / "config.json").write_text('{"model_type": "blt"}')
    os.mkfifo(folder / name)
    (tmp_path / "data").write_text("text")
    started = time.monotonic()
    done = blt(*command.format(f="f", configs=CONFIGS).split())
    assert time.monotonic() - started < 10  # it imports torch
    assert done.code in (1, 2)
    one_line(done)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["c.yaml", "tokenizer.json", "metrics.jsonl"])
def test_a_fifo_that_the_user_names(blt: Call, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    if name == "c.yaml":
        done = blt("train", "entropy", "-c", tmp_path / name, "-o", tmp_path / "out")
    elif name == "metrics.jsonl":
        done = blt("plot", tmp_path, "-o", tmp_path / "x.png")
    else:
        done = blt("patch", "text", "--model", tmp_path / name)
    assert done.code in (1, 2)
    one_line(done)


ESCAPES = "\x1b[31m[/red]\x9b2J\u202e\x07"
"""Colours, rich's markup, C1 codes and a change of direction."""


def printed_safely(text: str) -> None:
    assert text.strip()
    assert all(c.isprintable() for c in text if c not in "\n\t"), text


@pytest.mark.parametrize("options", [(), ("--json",), ("--tensors",)])
def test_control_characters_of_a_manifest_are_not_printed(
    blt: Call, tmp_path: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blt.bench.weight_bytes.bundle_weight_bytes", lambda *_: {"total": 1.0})
    write_bundle(tmp_path / "b")
    parity = [{"output": ESCAPES, "error": 0.0, "tolerance": 1.0, "positions": 1}]
    edit(tmp_path / "b", producer={ESCAPES: [ESCAPES]}, min_onnxruntime=ESCAPES, parity=parity)
    done = blt("inspect", tmp_path / "b", *options)
    assert done.code == 0, done.err
    printed_safely(done.text)
    assert "[/red]" in done.text
    if options == ("--json",):
        assert json.loads(done.text)["manifest"]["min_onnxruntime"] == ESCAPES


def test_control_characters_of_names_are_not_printed(blt: Call, tmp_path: Path) -> None:
    folder = tmp_path / ESCAPES.replace("/", "")
    folder.mkdir()
    save(folder / "model.pt", tiny("static"))
    done = blt("convert", folder / "model.pt", "-o", folder / "out.pt", "--to", "native")
    assert done.code == 0
    printed_safely(done.text)
    held = torch.load(folder / "model.pt", weights_only=True)
    held["blt"][ESCAPES] = torch.zeros(1)
    torch.save(held, folder / "model.pt")
    for file in ("model.pt", "nothing.pt"):
        one_line(blt("inspect", folder / file))
    one_line(blt("inspect", folder / "model.pt", f"--{ESCAPES}"))


@pytest.mark.parametrize("part", ["version", "config", "patch_rule"])
def test_nested_lists_in_a_checkpoint_end(blt: Call, tmp_path: Path, part: str) -> None:
    save(tmp_path / "model.pt", tiny("static"))
    held = torch.load(tmp_path / "model.pt", weights_only=True)
    nested: Any = "x"
    for _ in range(60):
        nested = [nested] * 10
    if part == "version":
        held["version"] = nested
    elif part == "config":
        held["config"]["blt"]["cross_k"] = nested
    else:
        held["config"]["patch_rule"]["scheme"] = nested
    torch.save(held, tmp_path / "model.pt")
    started = time.monotonic()
    assert len(one_line(blt("inspect", tmp_path / "model.pt"))) < 1000
    assert time.monotonic() - started < 10
