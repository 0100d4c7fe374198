"""Sparse hash tables are dense AdamW up to rounding, however long a row waits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from blt.checkpoint import models
from blt.train import Trainer, checkpoints, train
from blt.train.config import RunConfig, load_config
from blt.train.optim import optimizer_state
from blt.train.setup import prepare_run
from blt.train.tables import CatchUp
from blt_runtime.errors import CheckpointError, ConfigError
from tests.train.small import ONE_LAYER

KINDS = ("sparse", "dense")
SETTINGS = ["patching.scheme=space", "model.hash.rows=3001"]


def config_of(repo: Path, *settings: str) -> RunConfig:
    return load_config(repo / "configs" / "tiny.yaml", [*SETTINGS, *settings])


def trainer_of(config: RunConfig, out: Path, data: Path, compile: bool = False) -> Trainer:
    return prepare_run(config, out, data, compile=compile)[0]


def weight_of(trainer: Trainer) -> torch.nn.Parameter:
    return trainer.objective.model.get_parameter("hash_embedding.tables.weight")


def tables_of(trainer: Trainer) -> torch.Tensor:
    return weight_of(trainer).detach()


def test_sparse_is_dense(repo: Path, data: Path, tmp_path: Path) -> None:
    """Losses of every step, and tables at the end: rows without gradients for many steps, and rows never used."""
    sparse, dense = (trainer_of(config_of(repo, f"optimizer.tables={kind}"), tmp_path, data) for kind in KINDS)
    first = tables_of(dense).clone()
    for _ in range(30):
        assert sparse.train_step() == pytest.approx(dense.train_step(), rel=1e-5)
        assert sparse.state.norm == pytest.approx(dense.state.norm, rel=1e-4)
    assert sparse.validate() == pytest.approx(dense.validate(), rel=1e-5)
    assert sparse.state.tables is not None
    waiting = sparse.state.tables.last_R
    assert (waiting == 0).any()
    assert ((waiting > 0) & (waiting < 20)).any()
    sparse.finish()
    moved, difference = ((tables_of(dense) - other).abs() for other in (first, tables_of(sparse)))
    assert difference.max() < 1e-2 * moved.max()
    assert difference.mean() < 1e-5 * moved.max()
    second = dense.state.optimizer.state[weight_of(dense)]["exp_avg_sq"]
    assert (sparse.state.tables.exp_avg_sq_RD - second).abs().max() < 1e-3 * second.max()


def test_tables_of_an_entropy_model_train_alike(repo: Path, data: Path, tmp_path: Path) -> None:
    settings = ["model.n_layers=0", "model.hash={sizes: [2, 4], rows: 3001}"]
    configs = (
        load_config(repo / "configs" / "tiny-entropy.yaml", [*settings, f"optimizer.tables={kind}"]) for kind in KINDS
    )
    sparse, dense = (trainer_of(config, tmp_path, data) for config in configs)
    first = tables_of(dense).clone()
    for _ in range(8):
        assert sparse.train_step() == pytest.approx(dense.train_step(), rel=1e-5)
    sparse.finish()
    moved, difference = ((tables_of(dense) - other).abs() for other in (first, tables_of(sparse)))
    assert (moved > 0).all(1).sum() > 100
    assert difference.max() < 1e-2 * moved.max()


def test_tables_of_a_group_train_alike(repo: Path, data: Path, tmp_path: Path) -> None:
    group = "optimizer.groups=[{match: 'hash_*', betas: [0.5, 0.9], eps: 1.0e-9, weight_decay: 0.7}]"
    sparse, dense = (trainer_of(config_of(repo, group, f"optimizer.tables={kind}"), tmp_path, data) for kind in KINDS)
    first = tables_of(dense).clone()
    for _ in range(6):
        assert sparse.train_step() == pytest.approx(dense.train_step(), rel=1e-5)
    sparse.finish()
    moved, difference = ((tables_of(dense) - other).abs() for other in (first, tables_of(sparse)))
    assert difference.max() < 1e-2 * moved.max()
    plain = trainer_of(config_of(repo), tmp_path, data)
    for _ in range(6):
        plain.train_step()
    assert (tables_of(plain) - tables_of(dense)).abs().max() > 0.1 * moved.max()


STEPS_BEFORE, RATE = 300, 0.01
DERIVATIVE = 0.15
"""Of a position's nats, for `OptimizerConfig`'s arithmetic."""


def late_update(trainer: Trainer, targets: int) -> float:
    """How far a late step moves a row of the tables that one of `targets` positions reads."""
    state, gradient = trainer.state, DERIVATIVE / targets
    before = tables_of(trainer).clone()
    if state.tables is None:
        optimizer_state(trainer.objective.model, state.optimizer)
        state.optimizer.state[weight_of(trainer)]["step"].fill_(STEPS_BEFORE)
        weight_of(trainer).grad = torch.zeros_like(before)
        weight_of(trainer).grad[7] = gradient  # type: ignore[index]
        for group in state.optimizer.param_groups:
            group["lr"] = RATE
        state.optimizer.step()
        row = 7
    else:
        for _ in range(STEPS_BEFORE):
            state.tables.missed.step(RATE, 0.0)
        state.tables.gather(next(state.loader))
        state.tables.step(torch.full_like(state.tables.values[0], gradient), RATE)
        row = int(state.tables.rows_U[0])
    return float((before - tables_of(trainer))[row].mean())


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_read_once_gets_the_same_update_in_a_large_batch(
    repo: Path, data: Path, tmp_path: Path, kind: str
) -> None:
    """In batches of 4 kB and of 16 MB. With the eps of the other weights, it would get a sixth of it."""

    def update(targets: int, *settings: str) -> float:
        config = config_of(repo, f"optimizer.tables={kind}", "optimizer.weight_decay=0.0", *settings)
        return late_update(trainer_of(config, tmp_path, data), targets)

    whole = RATE * 0.1 / 0.05**0.5  # lr * (1 - beta1) / sqrt(1 - beta2): the bias of the moments has vanished
    assert update(1 << 12) == pytest.approx(whole, rel=1e-4)
    assert update(1 << 24) == pytest.approx(whole, rel=1e-4)
    left = 1 / (1 + 1e-8 * (1 << 24) / (0.05**0.5 * DERIVATIVE))
    assert left == pytest.approx(0.167, abs=0.001)
    assert update(1 << 24, "optimizer.table_eps=1.0e-8") == pytest.approx(left * whole, rel=1e-4)


@pytest.mark.parametrize(("betas", "decay"), [((0.9, 0.95), 0.1), ((0.9, 0.999), 0.0), ((0.0, 0.9), 0.3)])
def test_missed_updates_are_adamw_without_gradients(betas: tuple[float, float], decay: float) -> None:
    """Compared with single steps in float64, with a different rate in each."""
    random = np.random.default_rng(0)
    rates = random.uniform(1e-4, 1e-2, 80)
    missed = CatchUp(betas)
    for lr in rates:
        missed.step(lr, decay)
    for last in (1, 7, 50, 79, 80):
        w, m, v = 0.7, 0.02, 0.0003
        for t in range(last + 1, 81):
            m, v = m * betas[0], v * betas[1]
            step = m / (1 - betas[0] ** t) / (v / (1 - betas[1] ** t)) ** 0.5
            w = w * (1 - rates[t - 1] * decay) - rates[t - 1] * step
        caught_up = 0.7 * missed.decay[last] - missed.drift[last] * 0.02 / 0.0003**0.5
        assert caught_up == pytest.approx(w, rel=1e-10)


def test_micro_batches_share_the_rows(repo: Path, data: Path, tmp_path: Path) -> None:
    settings = ("optimizer.tables=sparse", "batch.micro_rows=1")
    parts, whole = (trainer_of(config_of(repo, *settings[:n]), tmp_path, data) for n in (2, 1))
    for _ in range(4):
        assert parts.train_step() == pytest.approx(whole.train_step(), rel=1e-5)


def test_resumed_bit_for_bit(repo: Path, data: Path, tmp_path: Path) -> None:
    config = config_of(repo, "optimizer.tables=sparse", "schedule.steps=20")
    whole = models.load(train(config, tmp_path / "whole", data=data)).require_blt()[0]
    first = trainer_of(config, tmp_path / "run", data)
    for _ in range(9):
        first.train_step()
    first.save()
    checkpoint = checkpoints.read_newest(first.folder)
    assert checkpoint is not None
    dense = trainer_of(config_of(repo), tmp_path / "run", data)
    with pytest.raises(CheckpointError, match=r"'optimizer.tables' \(sparse, not dense\)"):
        dense.restore(checkpoint)
    others = {
        "table_eps: 1.0e-6": r"eps of the sparse hash tables \(1e-15, not 1e-06\)",
        "groups: [{match: '*', betas: [0.8, 0.95]}]": r"betas of the sparse hash tables .*\(0.9, 0.95\), not",
    }
    for setting, message in others.items():
        other = trainer_of(config_of(repo, f"optimizer={{tables: sparse, {setting}}}"), tmp_path / "run", data)
        with pytest.raises(CheckpointError, match=message):
            other.restore(checkpoint)
    resumed = models.load(train(config, tmp_path / "run", data=data)).require_blt()[0]
    theirs = whole.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in resumed.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_from_before_tables_had_an_eps_keeps_its_eps(
    repo: Path, data: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = (f"optimizer.tables={kind}", "schedule.steps=8", "run.checkpoint_every=4", "optimizer.lr=0.01")
    older = config_of(repo, *settings, "optimizer.table_eps=1.0e-8")
    whole = models.load(train(older, tmp_path / "whole", data=data)).require_blt()[0].state_dict()
    half = checkpoints.checkpoint_folders(tmp_path / "whole" / "checkpoints")[0]
    without_new_settings(half)
    with caplog.at_level("INFO", "blt.train"):
        resumed = train(config_of(repo, *settings), tmp_path / "run", data=data, resume=str(half))
    assert "the hash tables keep the eps of the checkpoint, 1e-08" in caplog.text
    ours = models.load(resumed).require_blt()[0].state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in ours.items())
    given = config_of(repo, *settings, "optimizer.table_eps=1.0e-15")
    if kind == "sparse":
        with pytest.raises(CheckpointError, match=r"eps of the sparse hash tables \(1e-08, not 1e-15\)"):
            train(given, tmp_path / "given", data=data, resume=str(half))
    else:
        train(given, tmp_path / "given", data=data, resume=str(half))


def without_new_settings(checkpoint: Path) -> None:
    """As the version before `optimizer.groups` wrote it."""
    state, manifest = (json.loads((checkpoint / name).read_text()) for name in ("state.json", "manifest.json"))
    for key in ("table_eps", "groups"):
        del state["config"]["optimizer"][key]
    content = json.dumps(state).encode()
    (checkpoint / "state.json").write_bytes(content)
    manifest["files"]["state.json"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_tables_have_a_rate_and_can_be_frozen(repo: Path, data: Path, tmp_path: Path) -> None:
    pattern, sparse = "hash_embedding.*", "optimizer.tables=sparse"
    scaled = trainer_of(config_of(repo, sparse, f"optimizer.lr_scale={{{pattern!r}: 0.5}}"), tmp_path, data)
    assert scaled.state.tables is not None
    assert scaled.state.tables.settings.scale == 0.5
    frozen = trainer_of(config_of(repo, sparse, f"optimizer.freeze=[{pattern!r}]"), tmp_path, data)
    before = tables_of(frozen).clone()
    frozen.train_step()
    assert torch.equal(tables_of(frozen), before)


def test_settings_that_cannot_be_sparse_are_refused(repo: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no hash tables"):
        trainer_of(config_of(repo, "optimizer.tables=sparse", "model.hash=null"), tmp_path, data)
    with pytest.raises(ConfigError, match="square root"):
        trainer_of(config_of(repo, "optimizer={tables: sparse, betas: [0.99, 0.95]}"), tmp_path, data)


def test_something_else_must_train(repo: Path, data: Path, tmp_path: Path) -> None:
    names = [name for name, _ in trainer_of(config_of(repo), tmp_path, data).objective.model.named_parameters()]
    others = [name for name in names if not name.startswith("hash_embedding.")]
    config = config_of(repo, "optimizer.tables=sparse", f"optimizer.freeze=[{', '.join(others)}]")
    with pytest.raises(ConfigError, match="tables: dense"):
        trainer_of(config, tmp_path, data)


@pytest.mark.slow
def test_one_compilation_serves_other_rows(repo: Path, data: Path, tmp_path: Path) -> None:
    config = config_of(repo, "optimizer.tables=sparse", "batch.byte_buckets=[128]", *ONE_LAYER)
    compiled, eager = (trainer_of(config, tmp_path, data, compile) for compile in (True, False))
    torch._dynamo.reset()
    counters.clear()
    for _ in range(5):
        assert compiled.train_step() == pytest.approx(eager.train_step(), rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
