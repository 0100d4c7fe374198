"""Files that would hang a command, or fill the memory or the terminal: each is one typed line, at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
