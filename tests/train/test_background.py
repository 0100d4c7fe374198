"""Asynchronous checkpoints: training goes on while they are written, and they hold the state of their step."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blt.train import Trainer, checkpoints, train
from blt.train.background import BackgroundWriter
from blt.train.config import load_config
from blt.train.parallel import SINGLE
from blt_runtime.errors import CheckpointError

LONG = 60
"""Seconds after which a test that waits for another thread fails."""


class Gate:
    """`checkpoints.write`, which begins only after `open`."""

    def __init__(self) -> None:
        self.opened, self.original = threading.Event(), checkpoints.write
        self.ended: list[int] = []

    def __call__(self, folder: Path, step: int, *arguments: Any, **options: Any) -> Path:
        assert self.opened.wait(LONG), "training waits for the checkpoint"
        path = self.original(folder, step, *arguments, **options)
        self.ended.append(step)
        return path


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    found = Gate()
    monkeypatch.setattr(checkpoints, "write", found)
    return found


def test_a_checkpoint_holds_what_the_state_was_when_it_began(gate: Gate, tmp_path: Path) -> None:
    writer, weight, state = BackgroundWriter(SINGLE), torch.ones(3), {"config": {}, "window": [1]}
    writer.write(tmp_path, 1, {"weight": weight}, state, keep=2)
    weight += 1
    state["window"].append(2)  # type: ignore[attr-defined]
    assert checkpoints.read_newest(tmp_path) is None
    gate.opened.set()
    writer.close()
    found = checkpoints.read_newest(tmp_path)
    assert found is not None
    loaded = torch.zeros(3)
    found.load({"weight": loaded})
    assert torch.equal(loaded, torch.ones(3))
    assert found.state == {"step": 1, "config": {}, "window": [1]}


def test_a_write_waits_for_the_one_before(gate: Gate, tmp_path: Path) -> None:
    writer = BackgroundWriter(SINGLE)
    writer.write(tmp_path, 1, {"weight": torch.ones(3)}, {}, keep=2)
    opener = threading.Timer(0.2, gate.opened.set)
    opener.start()
    writer.write(tmp_path, 2, {"weight": torch.ones(3)}, {}, keep=2)
    assert 1 in gate.ended
    writer.close()
    opener.join()
    assert gate.ended == [1, 2]


@pytest.mark.parametrize("next_call", ["write", "wait", "close"])
def test_the_error_of_a_write_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, next_call: str
) -> None:
    def full(*arguments: Any, **options: Any) -> Path:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(checkpoints, "write", full)
    writer = BackgroundWriter(SINGLE)
    writer.write(tmp_path, 1, {}, {}, keep=2)
    calls: dict[str, Callable[[], None]] = {
        "write": lambda: writer.write(tmp_path, 2, {}, {}, keep=2), "wait": writer.wait, "close": writer.close,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="full"):
        calls[next_call]()


def test_steps_go_on_and_the_run_is_the_same(
    repo: Path, data: Path, entropy_run: Path, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of step 10 is written after step 15. The run ends with that of step 20, its last."""
    settings = ["run.async_checkpoints=true", "run.checkpoint_every=10", "schedule.decay_steps=40"]
    step = Trainer.train_step

    def opened_late(self: Trainer) -> float:
        assert bool(gate.ended) <= (self.state.step >= 15)
        loss = step(self)
        if self.state.step == 15:
            gate.opened.set()
        return loss

    monkeypatch.setattr(Trainer, "train_step", opened_late)
    config = load_config(repo / "configs" / "tiny-entropy.yaml", [*settings, "schedule.steps=20"])
    train(config, tmp_path / "run", data=data)
    assert gate.ended == [10, 20]
    ours, theirs = (checkpoints.read(run / "checkpoints" / "step-00000020") for run in (tmp_path / "run", entropy_run))
    assert loaded(ours).keys() == loaded(theirs).keys()
    assert all(torch.equal(tensor, loaded(theirs)[name]) for name, tensor in loaded(ours).items() if name != "rng")
    files = json.loads((ours.path / "manifest.json").read_text())["files"]
    assert sorted(files) == sorted(path.name for path in ours.path.iterdir() if path.name != "manifest.json")


def loaded(checkpoint: checkpoints.TrainingCheckpoint) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = checkpoint.path.glob("*.safetensors")
    return load_file(file)
