"""Checkpoints: complete or absent, verified, rotated; damage, a full disk or another run's files lose nothing."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from blt.checkpoint import models
from blt.train import Trainer, checkpoints, train
from blt.train.config import EntropyRun, load_config
from blt.train.setup import prepare_run
from blt_runtime.errors import CheckpointError, ConfigError, UsageError

STATE = {"config": {}, "bytes": 3}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = {"model.a": torch.randn(7, 3, generator=generator), "optimizer.a.step": torch.tensor(4.0)}
    return values | {"rng": torch.arange(5, dtype=torch.uint8)}


def empty() -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints, of steps 1 and 2."""
    for step in (1, 2):
        checkpoints.write(tmp_path / "checkpoints", step, tensors(step), STATE, keep=2)
    return tmp_path / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_written_is_read(folder: Path) -> None:
    checkpoint = checkpoints.read_newest(folder)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state) == (2, {"step": 2, **STATE})
    found = empty()
    checkpoint.load(found)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(2).items())
    assert {tensor.dtype for tensor in found.values()} == {torch.float32, torch.uint8}


def test_the_newest_few_are_kept(folder: Path) -> None:
    (folder / ".step-00000003.part").mkdir()
    (folder / ".step-00000001.old").mkdir()
    checkpoints.write(folder, 3, tensors(), STATE, keep=2)
    assert names(folder) == ["step-00000002", "step-00000003"]
    checkpoints.write(folder, 3, tensors(5), STATE, keep=1)  # written again, after a resume from an earlier step
    assert names(folder) == ["step-00000003"]
    assert checkpoints.read(folder / "step-00000003").step == 3


def test_milestones_are_kept_beside_the_newest_few(folder: Path) -> None:
    for step in range(3, 9):
        checkpoints.write(folder, step, tensors(step), STATE, keep=2, milestone=step in (3, 6))
    assert names(folder) == [f"step-{step:08d}" for step in (3, 6, 7, 8)]
    truncate(next((folder / "step-00000008").glob("shard*")))
    (folder / "step-00000007" / "state.json").unlink()
    newest = checkpoints.read_newest(folder)
    assert newest is not None
    assert newest.step == 6


def test_another_branch_is_hidden_at_once_and_removed_when_there_is_a_new_one(folder: Path) -> None:
    for step in (18, 20):
        checkpoints.write(folder, step, tensors(step), STATE, keep=9)
    checkpoints.set_aside(folder, 2)
    assert names(folder) == [".aside-step-00000018", ".aside-step-00000020", "step-00000001", "step-00000002"]
    newest = checkpoints.read_newest(folder)
    assert newest is not None
    assert newest.step == 2
    checkpoints.write(folder, 4, tensors(4), STATE, keep=2)
    assert names(folder) == ["step-00000002", "step-00000004"]


def test_a_truncated_one_is_not_among_those_kept(folder: Path) -> None:
    checkpoints.write(folder, 3, tensors(3), STATE, keep=3)
    truncate(next((folder / "step-00000002").glob("shard*")))
    (folder / "step-00000003" / "state.json").unlink()
    checkpoints.write(folder, 4, tensors(4), STATE, keep=2)
    assert names(folder) == ["step-00000001", "step-00000004"]


def test_old_ones_that_cannot_be_removed_are_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "rmtree", refuse)
    checkpoints.write(folder, 3, tensors(3), STATE, keep=1)
    assert "could not be removed (Read-only file system)" in caplog.text
    assert checkpoints.read(folder / "step-00000003").step == 3


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(30, "Read-only file system")


@pytest.mark.parametrize("call", ["mkdir", "rename"])
def test_a_disk_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    before = names(folder)
    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(CheckpointError, match=r"Read-only file system.*older ones are intact"):
        checkpoints.write(folder, 3, tensors(3), STATE, keep=1)
    assert names(folder) == before


def test_a_copy_may_have_any_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder / "step-00000002", tmp_path / "best")
    assert checkpoints.read(tmp_path / "best").step == 2
    monkeypatch.chdir(tmp_path / "best")
    assert checkpoints.read(Path()).path == tmp_path / "best"


def test_nothing_of_a_checkpoint_is_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(path.suffix for path in (folder / "step-00000002").iterdir()) == [".json", ".json", ".safetensors"]
    for name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("unpickled"))
    checkpoint = checkpoints.read_newest(folder)
    assert checkpoint is not None
    checkpoint.load(empty())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "shard"])
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_a_damaged_newest_checkpoint_is_skipped(
    folder: Path, caplog: pytest.LogCaptureFixture, file: str, damage: Callable[[Path], None]
) -> None:
    (path,) = (folder / "step-00000002").glob(f"{file}*")
    damage(path)
    checkpoint = checkpoints.read_newest(folder)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert "step-00000002" in caplog.text
    assert "trying the previous one" in caplog.text


def test_flipped_bits_are_seen(folder: Path) -> None:
    """Every seventh bit of the manifest, and one at random of every 37th byte of the other files."""
    random = np.random.default_rng(0)
    for path in sorted((folder / "step-00000002").iterdir()):
        content = path.read_bytes()
        everything = path.name == "manifest.json"
        places = range(0, 8 * len(content), 7) if everything else random.integers(8, size=len(content) // 37)
        for i, place in enumerate(places):
            changed = bytearray(content)
            byte, bit = divmod(place, 8) if everything else (37 * i, place)
            changed[byte] ^= 1 << bit
            if everything and same_json(changed, content):  # white space
                continue
            path.write_bytes(changed)
            with pytest.raises(CheckpointError):
                checkpoints.read(folder / "step-00000002")
        path.write_bytes(content)
    assert checkpoints.read(folder / "step-00000002").step == 2


def same_json(a: bytes | bytearray, b: bytes) -> bool:
    try:
        return bool(json.loads(a) == json.loads(b))
    except ValueError:
        return False


def test_more_or_other_files_than_in_the_manifest(folder: Path) -> None:
    (folder / "step-00000002" / "shard-00002-model.safetensors").write_bytes(b"more")
    with pytest.raises(CheckpointError, match="does not match its manifest"):
        checkpoints.read(folder / "step-00000002")
    (folder / "step-00000001").rename(folder / "step-00000009")
    with pytest.raises(CheckpointError, match="holds step 1"):
        checkpoints.read(folder / "step-00000009")


def test_a_manifest_cannot_point_outside(folder: Path) -> None:
    path = folder / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../step-00000001/state.json"] = manifest["files"]["state.json"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="missing"):
        checkpoints.read(folder / "step-00000002")


def killed_at(event: int, folder: Path) -> bool:
    """Writes step 3 in a child that is killed at its n-th use of the folder; False if it finished before."""
    child = os.fork()
    if child == 0:
        uses = itertools.count(1)

        def hook(name: str, arguments: tuple[object, ...]) -> None:
            watched = name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir")
            if watched and str(folder) in str(arguments[0]) and next(uses) == event:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        checkpoints.write(folder, 3, tensors(3), STATE, keep=2)
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def test_killed_anywhere_while_it_writes(folder: Path, tmp_path: Path) -> None:
    """Killed before every creation, rename and removal: the newest is a complete step 2 or 3, and writing works."""
    found, place = [], tmp_path / "copy"
    for event in itertools.count(1):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder, place)
        if not killed_at(event, place):
            break
        newest = checkpoints.read_newest(place)
        assert newest is not None
        found.append(newest.step)
        newest.load(empty())
        checkpoints.write(place, 4, tensors(4), STATE, keep=2)
        assert len(names(place)) == 2
        assert all(checkpoints.read(path) for path in place.iterdir())
    assert found == sorted(found)
    assert set(found) == {2, 3}
    assert len(found) > 10


def test_when_nothing_can_be_read(folder: Path) -> None:
    for path in folder.iterdir():
        truncate(path / "state.json")
    with pytest.raises(CheckpointError, match="start anew in another output folder"):
        checkpoints.read_newest(folder)
    assert checkpoints.read_newest(folder / "nowhere") is None


@pytest.mark.parametrize("change", [{"model.a": torch.zeros(7, 4)}, {"model.b": torch.zeros(1)}, {"rng": None}])
def test_other_tensors_than_the_runs(folder: Path, change: dict[str, Tensor | None]) -> None:
    wanted = {name: tensor for name, tensor in {**empty(), **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=f"{next(iter(change))} is .*start anew") as caught:
        checkpoints.read(folder / "step-00000002").load(wanted)
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_older_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> bytes:
        raise OSError(28, "No space left on device")

    before = names(folder)
    monkeypatch.setattr("safetensors.torch.save", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*older ones are intact") as caught:
        checkpoints.write(folder, 3, tensors(), STATE, keep=1)
    assert "\n" not in str(caught.value)
    assert names(folder) == before
    monkeypatch.undo()
    monkeypatch.setattr(checkpoints, "_sync", full)  # at the last possible moment
    with pytest.raises(CheckpointError, match="No space"):
        checkpoints.write(folder, 3, tensors(), STATE, keep=1)
    assert names(folder) == before
    assert checkpoints.read(folder / "step-00000002").step == 2


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to write larger files, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def trainer_of(config: EntropyRun, out: Path, data: Path) -> Trainer:
    return prepare_run(config, out, data)[0]


def test_a_run_that_could_not_write_continues_from_the_older_one(
    entropy_config: EntropyRun, data: Path, entropy_run: Path, tmp_path: Path
) -> None:
    """The kernel refuses the write. The weights are those of a run without a full disk."""
    out = tmp_path / "run"
    trainer = trainer_of(entropy_config, out, data)
    trainer.run(20)
    for _ in range(2):
        trainer.train_step()
    with largest_file(4096), pytest.raises(CheckpointError, match=r"File too large.*older ones are intact"):
        trainer.save()
    assert names(trainer.folder) == ["step-00000020"]
    path = train(entropy_config, out, data=data)
    ours, theirs = models.load(path).entropy, models.load(entropy_run).entropy
    assert ours is not None
    assert theirs is not None
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_resuming_something_else_is_refused(
    entropy_config: EntropyRun, entropy_run: Path, data: Path, repo: Path, tmp_path: Path
) -> None:
    for setting, name in (
        ("model.dim=32", "'model'"),
        ("run.seed=5", r"'run.seed' \(0, not 5\)"),
        ("run.dtype=bf16", "'run.dtype'"),
        ("batch.rows=2", r"'batch.rows' \(4, not 2\)"),
        ("optimizer.freeze=[norm.weight]", "'optimizer.freeze'"),
        ("optimizer.name=muon", r"'optimizer.name' \(adamw, not muon\)"),
    ):
        other = load_config(repo / "configs" / "tiny-entropy.yaml", [setting])
        with pytest.raises(CheckpointError, match=f"another {name}"):
            train(other, tmp_path / "a", data=data, resume=str(entropy_run))
    with pytest.raises(ConfigError, match="--resume auto"):
        train(entropy_config, entropy_run, data=data, resume="none")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        train(entropy_config, tmp_path / "b", data=data, resume=str(tmp_path))
    with pytest.raises(UsageError, match="no such folder"):
        train(entropy_config, tmp_path / "b", data=data, resume=str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        train(entropy_config, tmp_path / "c", data=data, resume=str(entropy_run / "model.pt"))


def test_one_checkpoint_can_be_named(entropy_config: EntropyRun, entropy_run: Path, data: Path, tmp_path: Path) -> None:
    older = entropy_run / "checkpoints" / "step-00000020"
    train(entropy_config, tmp_path / "run", data=data, resume=str(older))
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [30, 40, 40]


def test_milestones_of_a_run_are_models_and_can_be_resumed(
    entropy_config: EntropyRun, entropy_run: Path, data: Path, repo: Path, tmp_path: Path
) -> None:
    """At 15 and 30 of 40 steps; others are at 20 and 40, of which the last is kept."""
    out, settings = tmp_path / "run", ["run.milestones_every=15", "run.keep_checkpoints=1"]
    train(load_config(repo / "configs" / "tiny-entropy.yaml", settings), out, data=data)
    assert names(out / "checkpoints") == [f"step-{step:08d}" for step in (15, 30, 40)]
    milestone = out / "checkpoints" / "step-00000015"
    trainer = trainer_of(entropy_config, tmp_path / "other", data)
    for _ in range(15):
        trainer.train_step()
    found = models.load(milestone).entropy
    assert found is not None
    weights = zip(found.parameters(), trainer.objective.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    resumed = train(entropy_config, tmp_path / "resumed", data=data, resume=str(milestone))
    ours, theirs = models.load(resumed).entropy, models.load(entropy_run).entropy
    assert ours is not None
    assert theirs is not None
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    train(load_config(repo / "configs" / "tiny-entropy.yaml", ["schedule.steps=41"]), out, data=data)
    assert names(out / "checkpoints") == [f"step-{step:08d}" for step in (15, 30, 40, 41)]


def test_resuming_from_an_older_one_abandons_the_later_branch(
    entropy_config: EntropyRun, entropy_run: Path, data: Path, repo: Path, tmp_path: Path
) -> None:
    """20 and 40 are there; the new branch from 20 ends at 25, and a resumed run reads it."""
    out = tmp_path / "run"
    shutil.copytree(entropy_run, out)
    older = out / "checkpoints" / "step-00000020"
    shorter = load_config(repo / "configs" / "tiny-entropy.yaml", ["schedule={steps: 25, warmup: 5}"])
    train(shorter, out, data=data, resume=str(older))
    assert names(out / "checkpoints") == ["step-00000020", "step-00000025"]
    trainer = trainer_of(entropy_config, out, data)
    newest = checkpoints.read_newest(trainer.folder)
    assert newest is not None
    assert newest.step == 25


def test_another_runs_checkpoint_needs_its_own_folder(
    entropy_config: EntropyRun, entropy_run: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(entropy_run, out)
    theirs = entropy_run / "checkpoints" / "step-00000020"
    with pytest.raises(ConfigError, match=r"holds a run; resume it with --resume auto"):
        train(entropy_config, out, data=data, resume=str(theirs))
    assert names(out / "checkpoints") == names(entropy_run / "checkpoints")


def test_a_state_of_something_else(entropy_config: EntropyRun, entropy_run: Path, data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(entropy_config, tmp_path / "run", data)
    checkpoint = checkpoints.read(entropy_run / "checkpoints" / "step-00000040")
    del checkpoint.state["loader"]
    with pytest.raises(CheckpointError, match="incomplete"):
        trainer.restore(checkpoint)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
