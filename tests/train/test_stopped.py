"""A stopped run is a model: that of its newest checkpoint. If it has none, the error names what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from blt.checkpoint import models
from blt.checkpoint.formats import open_source
from blt.cli.inputs import existing_model, is_bundle
from blt.train import checkpoints
from blt.train.config import BLTRun, EntropyRun, RunConfig, load_config
from blt.train.run import train
from blt.train.setup import prepare_run
from blt_runtime.errors import BltError, CheckpointError


class Killed(BaseException):
    pass


def killed_at(
    monkeypatch: pytest.MonkeyPatch, step: int, config: RunConfig, out: Path, data: Path, **options: Any
) -> None:
    """Trains, and dies right after the checkpoint of a step."""
    write = checkpoints.write

    def dying(folder: Path, at: int, *arguments: Any, **keywords: Any) -> Path:
        path = write(folder, at, *arguments, **keywords)
        if at == step:
            raise Killed
        return path

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", dying)
        with pytest.raises(Killed):
            train(config, out, data=data, **options)
    assert not (out / "model.pt").exists()


def test_a_stopped_entropy_run_is_the_model_of_its_checkpoint(
    entropy_config: EntropyRun,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    killed_at(monkeypatch, 20, entropy_config, tmp_path / "run", data)
    with caplog.at_level("INFO", "blt.checkpoint"):
        found = models.load(tmp_path / "run").entropy
    assert "stopped at step 20 of 40" in caplog.text
    trainer, _ = prepare_run(entropy_config, tmp_path / "other", data)
    for _ in range(20):
        trainer.train_step()
    assert found is not None
    expected = trainer.objective.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


def test_a_stopped_blt_run_generates_with_the_entropy_model_of_the_run(
    blt_config: BLTRun, entropy_run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(monkeypatch, 20, blt_config, tmp_path / "run", data, entropy_model=entropy_run)
    stopped = models.load(tmp_path / "run", generates=True)
    assert stopped.require_blt()[1].threshold is not None
    assert stopped.entropy is not None
    train(blt_config, tmp_path / "run", data=data, entropy_model=entropy_run)
    finished = models.load(tmp_path / "run")
    assert finished.patch_rule == stopped.patch_rule
    assert finished.entropy is not None
    weights = zip(finished.entropy.parameters(), stopped.entropy.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_a_stopped_entropy_run_cuts_the_patches_of_a_blt(
    blt_config: BLTRun, entropy_config: EntropyRun, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(monkeypatch, 20, entropy_config, tmp_path / "entropy", data)
    short = load_config(Path(__file__).parents[2] / "configs" / "tiny.yaml", ["schedule={steps: 1, warmup: 0}"])
    train(short, tmp_path / "run", data=data, entropy_model=tmp_path / "entropy")
    assert models.load(tmp_path / "run").entropy is not None


def test_a_named_checkpoint_is_a_model_of_commands_and_a_damaged_one_is_refused(
    entropy_run: Path, tmp_path: Path
) -> None:
    found = Path(shutil.copytree(entropy_run / "checkpoints" / "step-00000020", tmp_path / "step-00000020"))
    assert existing_model(found) == found
    assert not is_bundle(found)
    assert models.load(found).entropy is not None
    (shard,) = found.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"step-00000020 is damaged"):
        open_source(found)


def test_a_damaged_checkpoint_is_skipped(entropy_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(entropy_run, tmp_path / "run"))
    (run / "model.pt").unlink()
    (shard,) = (run / "checkpoints" / "step-00000040").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    assert open_source(run).entropy is not None
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no undamaged checkpoint.*same `blt train` command"):
        open_source(run)


def test_a_run_before_its_first_checkpoint_tells_how_to_continue(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        CheckpointError, match="stopped before its first one; the same `blt train` command continues it"
    ):
        open_source(tmp_path)


def test_a_state_that_is_no_state_is_one_error(entropy_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(entropy_run, tmp_path / "run"))
    (run / "model.pt").unlink()
    for folder in (run / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text())
        size = (folder / "state.json").stat().st_size
        state["config"]["schedule"] = None
        (folder / "state.json").write_text(json.dumps(state).ljust(size)[:size])
    with pytest.raises(BltError, match=r"state\.json"):
        open_source(run)


def test_a_stopped_token_run_tells_how_to_get_its_model(
    repo: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    config = load_config(repo / "configs" / "tiny-bpe.yaml")
    killed_at(monkeypatch, 20, config, tmp_path / "run", data)
    with pytest.raises(CheckpointError, match=r"with --steps 20 it only writes the model\.pt"):
        open_source(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"step-00000020 --steps 20 and another -o writes its model"):
        open_source(tmp_path / "run" / "checkpoints" / "step-00000020")
    train(load_config(repo / "configs" / "tiny-bpe.yaml", ["schedule.steps=20"]), tmp_path / "run", data=data)
    assert models.load(tmp_path / "run").bpe is not None
