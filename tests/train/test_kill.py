"""After kill -9 at an arbitrary moment and a resume, the losses are those of an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

SETTINGS = ("run.log_every=1", "run.checkpoint_every=3")


def start(
    repo: Path, out: Path, data: Path, entropy_run: Path, settings: Sequence[str] = SETTINGS
) -> subprocess.Popen[bytes]:
    """The command itself, 60 steps."""
    paths = os.pathsep.join(str(repo / part) for part in (".", "export", "runtime"))
    arguments = ["train", "blt", "-c", str(repo / "configs" / "tiny.yaml"), "-o", str(out), "--data", str(data)]
    arguments += ["--entropy-model", str(entropy_run), "--steps", "60", "--threads", "1"]
    arguments += [word for setting in settings for word in ("--set", setting)]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "blt.cli", *arguments], env=environment)


def lines(out: Path) -> list[tuple[int, float, float]]:
    text = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").exists() else ""
    records = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return [(record["step"], record["loss"], record["norm"]) for record in records if "loss" in record]


def wait_for_step(process: subprocess.Popen[bytes], out: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while len(lines(out)) < step:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_twice_and_resumed(repo: Path, data: Path, entropy_run: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(repo, whole, data, entropy_run).wait(300) == 0
    for step, background in ((8, "false"), (31, "true")):
        settings = (*SETTINGS, f"run.async_checkpoints={background}")
        process = start(repo, killed, data, entropy_run, settings)
        wait_for_step(process, killed, step)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(repo, killed, data, entropy_run).wait(300) == 0
    assert lines(killed) == lines(whole)
    assert [step for step, *_ in lines(killed)] == list(range(1, 61))


@pytest.mark.slow
def test_killed_before_the_first_checkpoint(repo: Path, data: Path, entropy_run: Path, tmp_path: Path) -> None:
    out, settings = tmp_path / "run", ("run.log_every=1", "run.checkpoint_every=1000")
    process = start(repo, out, data, entropy_run, settings)
    wait_for_step(process, out, 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert start(repo, out, data, entropy_run, settings).wait(300) == 0
    assert [step for step, *_ in lines(out)] == list(range(1, 61))


@pytest.mark.slow
def test_sigterm_saves_and_the_next_start_continues(repo: Path, data: Path, entropy_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(repo, out, data, entropy_run)
    wait_for_step(process, out, 10)
    process.terminate()
    assert process.wait(300) == 143
    stopped = lines(out)[-1][0]
    assert (out / "checkpoints" / f"step-{stopped:08d}" / "manifest.json").is_file()
    assert start(repo, out, data, entropy_run).wait(300) == 0
    assert [step for step, *_ in lines(out)] == list(range(1, 61))
