"""A closed stdout: every command ends with exit code 141 and prints no error."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blt.checkpoint.models import save
from blt.cli import STAGES, failures, run
from tests.cli.calls import CONFIG
from tests.tiny import tiny

Call = Callable[..., Any]
CHECK = "check {model} --bytes 40 --seed 1 --row-bytes 30 --bundle {bundle}"
BENCH = "--prompt-bytes 20 --repeat 1 --threads 1"
PRINTS = [
    "--version",
    "--help",
    "data",
    "data info {data}",
    "data info {data} --json",
    "data prepare {text} -o {tmp}/new --force",
    "patch hello --scheme space",
    "patch hello --scheme space --json",
    "calibrate {model} {text} --mean-patch 3 --bpb-bytes 0 --tolerance 9",
    "train entropy -c {config} --dry-run",
    "train entropy -c {config} --dry-run --json",
    "eval {model} {text}",
    "eval {model} {text} --json",
    "eval {model} --suite characters --items 1",
    "score {model} {text} --npz {tmp}/out.npz --json",
    CHECK,
    "export {model} -o {tmp}/exported --force --no-check -q",
    "convert {model} -o {tmp}/converted --to native --force",
    "generate {model} hello -n 9 --ignore-eos",
    "generate {model} hello -n 9 --ignore-eos --raw --no-stream",
    "generate {model} hello -n 9 --ignore-eos --json",
    "generate {bundle} --jsonl {prompts} -o - -n 9",
    "chat {model} -n 9",
    f"bench latency {{bundle}} {BENCH} --new-bytes 9",
    f"bench patch {{bundle}} {BENCH}",
    f"bench throughput {{bundle}} {BENCH} --new-bytes 16 --batch 1",
    "inspect {model}",
    "inspect {model} --tensors",
    "inspect {bundle}",
    "inspect {bundle} --tensors --json",
    "push {model} owner/name --dry-run",
    "push {model} owner/name --dry-run --json",
    "plot {run}",
    "plot {run} --json",
    "env",
]
PRINTS_ELSEWHERE = {"build", "lm-eval", "pull", "serve"}
"""build needs a GPU (a stand-in is in tests/export/test_build.py);
lm-evaluation-harness prints; pull needs a hub (tests/share); serve writes to stderr only."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from blt_export import export

    folder = tmp_path_factory.mktemp("pipe")
    save(folder / "model.pt", tiny())
    export(tiny(), folder / "bundle", capacity=256, check=False)
    (folder / "text").write_bytes(b"All work and no play makes a dull text.\0" * 4)
    (folder / "prompts").write_text('{"prompt": "hello"}\n')
    (folder / "config").write_text(CONFIG)
    (folder / "run").mkdir()
    (folder / "run/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0, "bpb": 3.0, "bytes": 5}) + "\n")
    assert run(["data", "prepare", str(folder / "text"), "-o", str(folder / "data"), "-q"]) == 0
    return {path.stem: path for path in folder.iterdir()} | {"tmp": folder}


@contextmanager
def stdout_to(file: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch, open(file, "w", encoding="utf-8", closefd=False) as out:
        patch.setattr(sys, "stdout", out)
        yield
        patch.setattr(out, "flush", lambda: None)
        os.dup2(os.open(os.devnull, os.O_WRONLY), file)  # what is left in its buffer goes there


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    from blt.bench.machine import MemoryReader

    monkeypatch.setattr("blt.bench.measure.MemoryReader", lambda threads: MemoryReader(threads, 1 << 16))


@pytest.mark.parametrize("line", PRINTS)
def test_a_closed_pipe_is_exit_code_141(
    paths: dict[str, Path], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    with stdout_to(write, monkeypatch):
        code = run([word.format(**paths) for word in line.split()])
    os.close(write)
    assert code == failures.BROKEN_PIPE
    assert "error" not in capsys.readouterr().err


def test_every_command_is_tested() -> None:
    commands = {name for panel in STAGES.values() for name in panel}
    assert {line.split()[0] for line in PRINTS} >= commands - PRINTS_ELSEWHERE


@pytest.mark.parametrize("line", ["inspect {model}", "--help"])
def test_the_process_has_that_exit_code_and_prints_nothing(paths: dict[str, Path], line: str) -> None:
    """Also the interpreter's own last flush."""
    import subprocess

    words = [word.format(**paths) for word in line.split()]
    with subprocess.Popen(
        [sys.executable, "-m", "blt.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == failures.BROKEN_PIPE


def test_an_end_of_file_is_no_interruption(blt: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """typer reports an EOFError as Ctrl-C."""

    def fail(text: str) -> bytes:
        raise EOFError("the file ends early")

    monkeypatch.setattr("blt.cli.inputs.file_or_text", fail)
    done = blt("patch", "hello", "--scheme", "space")
    assert done.code == failures.FAILED
    assert "the file ends early" in done.err
