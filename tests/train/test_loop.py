"""The loop: it learns, stops, resumes bit for bit, and records its metrics."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blt.checkpoint import models
from blt.data import Batch, prepare
from blt.train import Terminated, Trainer, checkpoints, train
from blt.train.config import BLTRun, EntropyRun, RunConfig, load_config
from blt.train.objective import Objective
from blt.train.optim import make_optimizer
from blt.train.setup import prepare_run
from blt_runtime.errors import BltError, ConfigError, UsageError


def records(out: Path, *keys: str) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(key) for key in keys) for line in lines]


def trainer_of(config: RunConfig, out: Path, data: Path, entropy: Path | None = None) -> Trainer:
    return prepare_run(config, out, data, entropy_model=entropy)[0]


def resume(trainer: Trainer) -> None:
    checkpoint = checkpoints.read_newest(trainer.folder)
    assert checkpoint is not None
    trainer.restore(checkpoint)


def same_state(a: Trainer, b: Trainer) -> bool:
    pairs = zip(a.objective.model.state_dict().values(), b.objective.model.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_the_entropy_model_learns_and_is_saved(entropy_run: Path) -> None:
    valid = [bpb for _, bpb in records(entropy_run, "step", "valid_bpb") if bpb is not None]
    assert valid[-1] < valid[0] < math.log2(260)
    saved = models.load(entropy_run)
    assert saved.blt is None
    assert saved.entropy is not None
    assert saved.entropy.config.dim == 16


def test_the_blt_learns_and_its_checkpoint_is_complete(
    blt_config: BLTRun, data: Path, entropy_run: Path, tmp_path: Path
) -> None:
    path = train(blt_config, tmp_path / "run", data=data, entropy_model=entropy_run)
    rows = records(tmp_path / "run", "step", "valid_bpb", "loss", "patch_size", "padding", "bytes_per_s", "lr", "bpb")
    valid = [row[1] for row in rows if row[1] is not None]
    assert valid[-1] < valid[0]
    logged = [row for row in rows if row[2] is not None]
    assert [row[0] for row in logged] == [10, 20, 30, 40]
    assert all(isinstance(value, float) for row in logged for value in row[2:])
    assert np.mean([row[3] for row in logged]) == pytest.approx(4.0, rel=0.25)
    saved = models.load(path)
    _, rule = saved.require_blt()
    assert rule.threshold is not None
    assert rule.max_patch_length == 8
    assert len(checkpoints.checkpoint_folders(tmp_path / "run" / "checkpoints")) == 2


def test_stop_and_resume_is_bit_exact(blt_config: BLTRun, data: Path, entropy_run: Path, tmp_path: Path) -> None:
    whole = trainer_of(blt_config, tmp_path / "whole", data, entropy_run)
    losses = [whole.train_step() for _ in range(12)]
    first = trainer_of(blt_config, tmp_path / "run", data, entropy_run)
    for _ in range(5):
        first.train_step()
    first.save()
    second = trainer_of(blt_config, tmp_path / "run", data, entropy_run)
    resume(second)
    assert second.state.bytes == first.state.bytes
    assert [second.train_step() for _ in range(7)] == losses[5:]
    assert same_state(second, whole)


@pytest.mark.parametrize("tables", ["dense", "sparse"])
def test_muon_resumes_bit_exactly(repo: Path, data: Path, tmp_path: Path, tables: str) -> None:
    settings = ["patching.scheme=space", "optimizer.name=muon", f"optimizer.tables={tables}"]
    config = load_config(repo / "configs" / "tiny.yaml", settings)
    whole, first, second = (trainer_of(config, tmp_path / name, data) for name in ("whole", "run", "run"))
    losses = [whole.train_step() for _ in range(8)]
    for _ in range(3):
        first.train_step()
    first.save()
    resume(second)
    assert [second.train_step() for _ in range(5)] == losses[3:]
    assert same_state(second, whole)


def test_resume_through_train_gives_the_same_model_and_metrics(
    entropy_config: EntropyRun, data: Path, entropy_run: Path, tmp_path: Path
) -> None:
    """Stopped at 20 of 40 steps by a shorter target, not by another schedule."""
    out = tmp_path / "run"
    stopped = trainer_of(entropy_config, out, data)
    stopped.run(20)
    with (out / "metrics.jsonl").open("a") as file:  # as after a kill between two checkpoints
        file.write('{"step": 30, "loss": 9.0}\n{"step": 3')
    path = train(entropy_config, out, data=data)
    assert records(out, "step", "loss", "valid_bpb") == records(entropy_run, "step", "loss", "valid_bpb")
    ours, theirs = models.load(path).entropy, models.load(entropy_run).entropy
    assert ours is not None
    assert theirs is not None
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_the_line_after_a_stop_averages_over_all_its_steps(
    entropy_config: EntropyRun, data: Path, entropy_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stopped = trainer_of(entropy_config, out, data)
    stopped.out.mkdir()
    for _ in range(7):
        stopped.train_step()
    stopped.save()
    train(entropy_config, out, data=data)
    assert records(out, "step", "loss", "bpb") == records(entropy_run, "step", "loss", "bpb")


def test_the_optimizers_settings_are_the_configurations(
    entropy_config: EntropyRun, data: Path, repo: Path, tmp_path: Path
) -> None:
    first = trainer_of(entropy_config, tmp_path / "run", data)
    first.train_step()
    first.save()
    other = load_config(repo / "configs" / "tiny-entropy.yaml", ["optimizer.weight_decay=0.3", "optimizer.eps=1.0e-6"])
    second = trainer_of(other, tmp_path / "run", data)
    resume(second)
    (group,) = second.state.optimizer.param_groups
    assert (group["weight_decay"], group["eps"], group["betas"]) == (0.3, 1e-6, (0.9, 0.95))


def test_a_folder_that_is_no_run_is_refused(entropy_config: EntropyRun, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "precious"
    out.mkdir()
    (out / "model.pt").write_text("mine")
    (out / "config.json").write_text('{"architectures": []}')
    with pytest.raises(UsageError, match="no run"):
        train(entropy_config, out, data=data)
    assert (out / "model.pt").read_text() == "mine"
    train(entropy_config, out, data=data, force=True)
    assert models.load(out).entropy is not None
    with pytest.raises(UsageError, match="is a file"):
        train(entropy_config, out / "model.pt", data=data)


def signal_at_step_6(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals) -> None:
    """The process signals itself at the beginning of step 6."""
    step = trainer.train_step

    def interrupted() -> float:
        if trainer.state.step == 6:
            os.kill(os.getpid(), sent)
        return step()

    monkeypatch.setattr(trainer, "train_step", interrupted)


def test_sigterm_saves_and_exits_with_143(
    entropy_config: EntropyRun, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(entropy_config, tmp_path / "run", data)
    signal_at_step_6(trainer, monkeypatch, signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="step 7") as caught:
        trainer.run(40)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    checkpoint = checkpoints.read_newest(trainer.folder)
    assert checkpoint is not None
    assert checkpoint.step == 7


def test_ctrl_c_names_the_step_and_how_to_continue(
    entropy_config: EntropyRun, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(entropy_config, tmp_path / "run", data)
    signal_at_step_6(trainer, monkeypatch, signal.SIGINT)
    with pytest.raises(Terminated, match="interrupted, saved at step 7; run the same command to continue") as caught:
        trainer.run(40)
    assert caught.value.exit_code == 130


@pytest.mark.parametrize("at", [0, 3])
def test_ctrl_c_while_a_step_compiles_loses_nothing(
    entropy_config: EntropyRun, data: Path, tmp_path: Path, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The interrupted step runs again with the same batch. The weights are those of an uninterrupted run."""
    whole = trainer_of(entropy_config, tmp_path / "whole", data)
    whole.run(6)
    trainer = trainer_of(entropy_config, tmp_path / "run", data)
    total = trainer.objective._sum

    def compiling(*tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if trainer.state.step == at:
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the signal did not end the compilation")
        return total(*tensors)

    trainer.objective._sum = compiling
    for _ in range(at):
        trainer.train_step()
    trainer.objective._compiled = set()
    trainer.advice = "start again"
    with (
        caplog.at_level("INFO", "blt.train"),
        pytest.raises(Terminated, match=f"interrupted, saved at step {at}; start again"),
    ):
        trainer.run(6)
    assert "compiling the training step for rows of 128 ..." in caplog.text
    again = trainer_of(entropy_config, tmp_path / "run", data)
    resume(again)
    assert again.state.step == at
    again.run(6)
    assert same_state(again, whole)


def test_a_signal_in_the_last_step_still_finishes(
    entropy_config: EntropyRun, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(entropy_config, tmp_path / "run", data)
    step = trainer.train_step

    def interrupted() -> float:
        if trainer.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    monkeypatch.setattr(trainer, "train_step", interrupted)
    trainer.run(3)
    assert trainer.state.step == 3


def test_ctrl_c_before_the_first_step_is_one_line(
    entropy_config: EntropyRun, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("blt.train.run.prepare_run", interrupted)
    with pytest.raises(BltError, match=r"interrupted before the first step.*run the same command") as caught:
        train(entropy_config, tmp_path / "run", data=data)
    assert caught.value.exit_code == 130
    assert not (tmp_path / "run").exists()


def test_missing_inputs_of_a_run_are_named(
    blt_config: BLTRun, entropy_config: EntropyRun, data: Path, repo: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--data"):
        train(entropy_config, tmp_path / "run")
    with pytest.raises(UsageError, match="no such data folder"):
        train(entropy_config, tmp_path / "run", data=tmp_path / "missing")
    with pytest.raises(ConfigError, match="--entropy-model"):
        train(blt_config, tmp_path / "run", data=data)
    with pytest.raises(BltError, match="no group"):
        train(load_config(repo / "configs" / "tiny-entropy.yaml", ["data.groups=[x]"]), tmp_path / "run", data=data)
    assert not (tmp_path / "run").exists()


def test_a_group_without_training_text_is_named(repo: Path, tmp_path: Path) -> None:
    for split, group in (("train", "a"), ("valid", "a"), ("valid", "b")):
        (tmp_path / "in" / split).mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / split / f"{group}.txt").write_text(f"{split} {group}")
    prepare([tmp_path / "in"], tmp_path / "data")
    config = load_config(repo / "configs" / "tiny-entropy.yaml", ["data.groups=[a, b]"])
    with pytest.raises(ConfigError, match="'b' has no training documents"):
        train(config, tmp_path / "run", data=tmp_path / "data")


def test_the_data_may_move_and_validation_may_change(repo: Path, data: Path, entropy_run: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "moved")
    settings = [f"data.path={tmp_path / 'moved'}", "data.valid_bytes=100", "schedule.steps=41"]
    config = load_config(repo / "configs" / "tiny-entropy.yaml", settings)
    train(config, tmp_path / "run", resume=str(entropy_run))
    assert records(tmp_path / "run", "step") == [(41,), (41,)]


def test_space_patches_need_no_entropy_model(data: Path, repo: Path, tmp_path: Path) -> None:
    config = load_config(repo / "configs" / "tiny.yaml", ["patching.scheme=space", "schedule={steps: 2, warmup: 0}"])
    saved = models.load(train(config, tmp_path / "run", data=data))
    assert saved.entropy is None
    assert saved.patch_rule is not None
    assert saved.patch_rule.scheme == "space"


def test_a_run_without_validation_text(entropy_run: Path, tmp_path: Path, repo: Path) -> None:
    (tmp_path / "one.txt").write_bytes(b"the only document, " * 50)
    prepare([tmp_path / "one.txt"], tmp_path / "data", split=(1, 0, 0))
    config = load_config(repo / "configs" / "tiny.yaml", ["schedule.steps=20"])
    train(config, tmp_path / "run", data=tmp_path / "data", entropy_model=entropy_run)
    assert [bpb for (bpb,) in records(tmp_path / "run", "valid_bpb") if bpb is not None] == []
    assert records(tmp_path / "run", "step") == [(10,), (20,)]


def test_padding_costs_nothing_and_counts_nothing(
    blt_config: BLTRun, data: Path, entropy_run: Path, tmp_path: Path
) -> None:
    """The same rows in a longer bucket have the same loss."""
    trainer = trainer_of(blt_config, tmp_path, data, entropy_run)
    batch = next(trainer.state.loader)
    lengths = batch.patch_lengths
    assert lengths is not None
    last = (lengths > 0).sum(1) - 1
    longer = lengths.copy()
    longer[np.arange(len(last)), last] += 20

    def wide(array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, 20)))

    arrays = (wide(batch.ids), wide(batch.targets), wide(batch.mask), longer, batch.starts)
    padded = Batch(*arrays, batch.block, row_tokens=batch.row_tokens)
    (short, _), (long, _) = trainer.objective(batch), trainer.objective(padded)
    assert batch.n_targets == padded.n_targets
    assert long.item() == pytest.approx(short.item(), rel=1e-6)
    short.backward()
    assert padded.mask.size == batch.mask.size + 80
    assert padded.n_tokens == batch.n_tokens


def test_golden_training_loss(golden: Path) -> None:
    """The loss of facebookresearch/blt's training batch, by our objective (tests/model checks the gradients)."""
    expected = json.loads((golden / "a" / "train.json").read_text())
    case = np.load(golden / "a" / "cases.npz")
    blt, _ = models.load(golden / "a" / "blt").require_blt()
    tokens, lengths = case["train_batch/tokens"], case["train_batch/patch_lengths"]
    real = np.array(expected["mask"]).astype(bool)
    batch = Batch(tokens, np.array(expected["targets"]), real, lengths, np.zeros(2, np.int64), 0)
    total, _ = Objective(blt.train(), int(lengths[:, :-1].max()))(batch)
    loss = total / batch.n_targets
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)


def test_weight_decay_is_on_all_parameters(entropy_config: EntropyRun, data: Path, tmp_path: Path) -> None:
    model = trainer_of(entropy_config, tmp_path, data).objective.model
    optimizer = make_optimizer(model, entropy_config.optimizer)
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.1
    assert group["betas"] == (0.9, 0.95)
    assert sum(p.numel() for p in group["params"]) == sum(p.numel() for p in model.parameters())


def test_bfloat16_trains_without_a_warning(
    blt_config: BLTRun, data: Path, entropy_run: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Norms keep float32 weights in bfloat16 runs. Torch warns about that once per process by default."""
    run = blt_config.run.model_copy(update={"dtype": "bf16"})
    trainer = trainer_of(blt_config.model_copy(update={"run": run}), tmp_path, data, entropy_run)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        trainer.run(2)
    finally:
        torch.set_warn_always(always)
    assert trainer.state.step == 2
    assert not [warning for warning in recwarn if "Mismatch dtype" in str(warning.message)]


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_runs_set_what_cublas_needs(
    repo: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"})
    settings = ["schedule={steps: 1, warmup: 1}", f"run.deterministic={str(wanted).lower()}"]
    train(load_config(repo / "configs" / "tiny-entropy.yaml", settings), tmp_path / "run", data=data)
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)
