"""The moving averages of the weights: their formula, what uses them, and that they survive a stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blt.checkpoint import models
from blt.model import EntropyModel
from blt.train import Trainer, checkpoints, train
from blt.train.config import RunConfig, load_config
from blt.train.memory import memory
from blt.train.progress import fields
from blt.train.setup import prepare_run
from blt_runtime.errors import ConfigError

DECAY = 0.6
SETTINGS = (f"optimizer.ema={DECAY}", "schedule={steps: 20, warmup: 2}", "run.valid_every=5", "run.checkpoint_every=10")


def config_of(repo: Path, *settings: str) -> RunConfig:
    return load_config(repo / "configs" / "tiny-entropy.yaml", [*SETTINGS, *settings])


def trainer_of(repo: Path, data: Path, out: Path, *settings: str) -> Trainer:
    return prepare_run(config_of(repo, *settings), out, data)[0]


def resumed(repo: Path, data: Path, out: Path, *settings: str) -> Trainer:
    trainer = trainer_of(repo, data, out, *settings)
    checkpoint = checkpoints.read_newest(trainer.folder)
    assert checkpoint is not None
    trainer.restore(checkpoint)
    return trainer


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.objective.model.named_parameters()}


def averages_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    assert trainer.state.averages is not None
    return trainer.state.averages.tensors


def entropy_model(path: Path) -> EntropyModel:
    found = models.load(path).entropy
    assert found is not None
    return found


def equal(found: EntropyModel, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(p, expected[name]) for name, p in found.named_parameters())


def test_averages_follow_the_weights_by_the_formula(repo: Path, data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(repo, data, tmp_path / "run", "optimizer.freeze=['byte_embedding.*']")
    expected = {name: weight.double() for name, weight in weights_of(trainer).items()}
    kept = []
    for t in range(1, 21):
        trainer.train_step()
        kept.append(min(DECAY, t / (t + 9)))
        for name, weight in weights_of(trainer).items():
            expected[name] = kept[-1] * expected[name] + (1 - kept[-1]) * weight.double()
    assert kept[0] == 0.1
    assert kept[-1] == DECAY
    assert averages_of(trainer).keys() == expected.keys() - {"byte_embedding.weight"}
    for name, average in averages_of(trainer).items():
        assert torch.allclose(average.double(), expected[name], rtol=1e-5, atol=1e-6), name


def test_a_resumed_run_has_the_same_averages_and_they_change_no_weight(repo: Path, data: Path, tmp_path: Path) -> None:
    whole, first = (trainer_of(repo, data, tmp_path / name) for name in ("whole", "run"))
    plain = trainer_of(repo, data, tmp_path / "plain", "optimizer.ema=null")
    whole.run(10)
    plain.run(10)
    first.run(7)
    second = resumed(repo, data, tmp_path / "run")
    second.run(10)
    for ours in (second, plain):
        assert all(torch.equal(p, weights_of(whole)[name]) for name, p in weights_of(ours).items())
    assert all(torch.equal(a, averages_of(whole)[name]) for name, a in averages_of(second).items())


def test_validation_and_the_final_model_use_averages(
    repo: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    with caplog.at_level("INFO", "blt.train"):
        train(config_of(repo, "run.sample_every=20"), out, data=data)
    assert "wrote the model of averaged weights" in caplog.text
    trainer = resumed(repo, data, out)
    record = trainer.validate()
    assert "bits/byte of averaged weights" in fields(record)[0]
    averages = {name: tensor.clone() for name, tensor in averages_of(trainer).items()}
    assert equal(entropy_model(out), averages)
    assert equal(entropy_model(out / "checkpoints" / "step-00000020"), averages)
    trained = resumed(repo, data, out, "optimizer.ema=null")
    assert trained.validate()["valid_bpb"] != record["valid_bpb"]
    for name, parameter in trained.objective.model.named_parameters():
        parameter.data.copy_(averages[name])
    assert trained.validate()["valid_bpb"] == record["valid_bpb"]


def test_the_trained_weights_of_a_finished_run_can_be_had_too(repo: Path, data: Path, tmp_path: Path) -> None:
    """And averages can begin at a checkpoint that has none."""
    out = tmp_path / "run"
    train(config_of(repo), out, data=data)
    expected = weights_of(resumed(repo, data, out))
    last = str(out / "checkpoints" / "step-00000020")
    train(config_of(repo, "optimizer.ema=null"), tmp_path / "trained", data=data, resume=last)
    assert equal(entropy_model(tmp_path / "trained"), expected)
    assert not equal(entropy_model(out), expected)
    train(config_of(repo, "optimizer.ema=null", "schedule.steps=21"), tmp_path / "without", data=data, resume=last)
    again = resumed(repo, data, tmp_path / "without")
    assert again.state.averages is not None
    assert again.state.averages.updates == 0
    assert all(torch.equal(a, weights_of(again)[name]) for name, a in averages_of(again).items())


def test_averages_of_sparse_tables_are_refused(repo: Path) -> None:
    with pytest.raises(ConfigError, match=r"optimizer: ema changes every row .* use tables: dense"):
        load_config(repo / "configs" / "tiny.yaml", ["optimizer={ema: 0.9, tables: sparse}"])


def test_the_dry_run_counts_averages(repo: Path) -> None:
    plain, averaged, frozen = (
        memory(load_config(repo / "configs" / "tiny-entropy.yaml", settings))["weights_and_optimizer"]
        for settings in ([], ["optimizer.ema=0.9"], ["optimizer={ema: 0.9, freeze: [output.weight]}"])
    )
    output = 260 * 16
    assert averaged * 3 == plain * 4
    assert averaged - frozen == 4 * 3 * output
