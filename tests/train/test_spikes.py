"""Spikes of the loss: what counts as one, the way back, and that a run that is killed on it ends with the same bits."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blt.train import Trainer, checkpoints, spikes
from blt.train.config import load_config
from blt.train.objective import Diverged
from blt.train.setup import prepare_run
from blt.train.spikes import Spikes
from blt_runtime.errors import CheckpointError

STEPS, BEFORE, EVERY = 32, 20, 5
"""The step after BEFORE steps is a spike. Checkpoints are EVERY steps apart."""
SETTINGS = (
    f"schedule={{steps: {STEPS}, warmup: 2}}", f"run.checkpoint_every={EVERY}", "run.log_every=1",
    "run.valid_every=100", "run.keep_checkpoints=1", "run.spike_rollback=2",
)  # fmt: skip
HIGH = 1e5
Place = tuple[int, int, int]
CLOCKS = ("seconds", "bytes_per_s", "flops_per_s", "memory_bytes", "data_wait_s", "data_wait")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """From step 21, the newest checkpoint of at least six steps before is that of step 10."""
    for name, value in (("WINDOW", 8), ("BACK", 6), ("SKIP", 3)):
        monkeypatch.setattr(spikes, name, value)


def place_of(trainer: Trainer) -> Place:
    """Of the batch that was read last."""
    at = trainer.state.loader.state()
    return at["epoch"], at["block"], at["batch"]


def spoil(trainer: Trainer, places: set[Place], nats: float) -> Trainer:
    """The losses of these batches are so many nats higher."""
    read = trainer._read

    def spoiled(total: torch.Tensor, norm: torch.Tensor) -> tuple[float, float]:
        return read(total + (nats if place_of(trainer) in places else 0), norm)

    trainer._read = spoiled  # type: ignore[method-assign]
    return trainer


def trainer_of(repo: Path, data: Path, out: Path, *settings: str) -> Trainer:
    return prepare_run(load_config(repo / "configs" / "tiny-entropy.yaml", [*SETTINGS, *settings]), out, data)[0]


@pytest.fixture(scope="module")
def places(repo: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Place]:
    """Of the batches in order."""
    trainer = trainer_of(repo, data, tmp_path_factory.mktemp("places") / "run")
    found = []
    for _ in range(3 * STEPS):
        next(trainer.state.loader)
        found.append(place_of(trainer))
    return found


def records(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.objective.model.parameters()]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


Result = tuple[list[torch.Tensor], list[dict[str, Any]], dict[str, Any]]


@pytest.fixture
def reference(repo: Path, data: Path, tmp_path: Path, places: list[Place]) -> Result:
    """A run that reads the batches 1 to 10 and, from then on, those from 25 on: never the spike, number 21."""
    trainer = trainer_of(repo, data, tmp_path / "reference", "run.spike_rollback=0")
    trainer.run(10)
    epoch, block, batch = places[BEFORE + 3]
    trainer.state.loader.restore({"epoch": epoch, "block": block, "batch": batch})
    trainer.run(STEPS)
    kept = [record for record in records(tmp_path / "reference") if record["step"] != 10 or "loss" in record]
    return weights(trainer), kept, trainer.state.loader.state()


def test_the_limit_is_that_of_median_and_mad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spikes, "WINDOW", 9)
    kept, losses = Spikes(1), np.random.default_rng(0).normal(2, 0.1, 15)
    for number, loss in enumerate(losses):
        assert math.isinf(kept.limit()) == (number < 9)
        kept.add(float(loss))
    last = losses[-9:]
    limit = np.median(last) + 7 * 1.4826 * np.median(abs(last - np.median(last)))
    assert kept.limit() == pytest.approx(limit)
    assert not kept.found(limit - 1e-6, 1e9)
    assert "above" in kept.found(limit + 1e-6, 1.0)
    assert kept.found(math.nan, 1.0) == "the loss is nan"
    assert kept.found(1.0, math.inf) == "the gradient norm is inf"
    assert not Spikes(0).found(math.nan, 1.0)
    again = Spikes(1)
    again.restore(json.loads(json.dumps(kept.state())))
    assert again.limit() == kept.limit()


def test_targets_are_needed_until_no_spike_can_lead_to_them() -> None:
    """Against every later spike, by trying them all."""
    kept = Spikes(1)
    for kept.returned, at in itertools.product((None, 10), range(10, 40)):
        later = [[s for s in range(t + 1) if kept.is_target(s, t, EVERY)] for t in range(at, at + 60)]
        wanted = {newest for targets in later if (newest := max(targets, default=-1)) <= at} - {-1}
        needed = {step for step in range(at + 1) if kept.is_needed(step, at, EVERY)}
        assert wanted <= needed
        assert len(needed) <= 3
    assert not Spikes(0).is_needed(0, 0, EVERY)


@pytest.mark.parametrize("nats", [HIGH, math.nan])
def test_a_run_goes_back_and_ends_like_one_that_never_read_the_batches(
    repo: Path, data: Path, tmp_path: Path, places: list[Place], reference: Result, nats: float,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    trainer = spoil(trainer_of(repo, data, tmp_path / "run"), {places[BEFORE]}, nats)
    trainer.run(STEPS)
    expected_weights, expected_records, loader = reference
    assert same(weights(trainer), expected_weights)
    assert trainer.state.loader.state() == loader
    found = records(tmp_path / "run")
    (event,) = [record for record in found if "spike_step" in record]
    assert event == {"step": 10, "spike_step": 21, "rollbacks": 1, "skipped_batches": 11 + 3}
    assert [record for record in found if record is not event] == expected_records
    assert (trainer.state.spikes.rollbacks, trainer.state.spikes.skipped) == (1, 14)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "at step 21, epoch" in warning
    assert "back to step 10, skipping 14 batches" in warning


class Killed(BaseException):
    pass


def die(*_: Any, **__: Any) -> None:
    raise Killed


def killed(trainer: Trainer, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs until a moment of the rollback, or until step 17 or, after the rollback, 13."""
    step, cut = trainer.train_step, trainer.metrics.return_to
    with monkeypatch.context() as patch:
        if moment == "before the event":
            patch.setattr(trainer.metrics, "return_to", die)
        elif moment == "before the checkpoint":

            def written(*given: Any) -> None:
                cut(*given)
                die()

            patch.setattr(trainer.metrics, "return_to", written)
        elif moment == "while older ones are hidden":
            patch.setattr(checkpoints, "set_aside", die)
        else:
            at, rollbacks = (13, 1) if moment == "after it" else (17, 0)

            def dying() -> float:
                if (trainer.state.step, trainer.state.spikes.rollbacks) == (at, rollbacks):
                    trainer.save()  # as after a signal; this is no regular checkpoint
                    die()
                return step()

            patch.setattr(trainer, "train_step", dying)
        with pytest.raises(Killed):
            trainer.run(STEPS)


@pytest.mark.parametrize(
    "moment", ["before it", "before the event", "before the checkpoint", "while older ones are hidden", "after it"]
)
def test_a_run_that_is_killed_around_a_rollback_ends_with_the_same_bits(
    repo: Path, data: Path, tmp_path: Path, places: list[Place], reference: Result, moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out, bad = tmp_path / "run", {places[BEFORE]}
    killed(spoil(trainer_of(repo, data, out), bad, HIGH), moment, monkeypatch)
    trainer = spoil(trainer_of(repo, data, out), bad, HIGH)
    checkpoint = checkpoints.read_newest(trainer.folder)
    assert checkpoint is not None
    trainer.restore(checkpoint)
    trainer.metrics.cut(checkpoint.step)
    trainer.run(STEPS)
    assert same(weights(trainer), reference[0])
    found = records(out)
    assert sum("spike_step" in record for record in found) == 1
    assert [record for record in found if "spike_step" not in record] == reference[1]
    assert (trainer.state.spikes.rollbacks, trainer.state.spikes.skipped) == (1, 14)


def test_after_so_many_rollbacks_a_spike_is_an_error(
    repo: Path, data: Path, tmp_path: Path, places: list[Place]
) -> None:
    """The second and third spike follow two steps after a return to step 10, which is a target at once."""
    out = tmp_path / "run"
    trainer = spoil(trainer_of(repo, data, out), {places[at] for at in (BEFORE, BEFORE + 6, BEFORE + 12)}, HIGH)
    with pytest.raises(Diverged, match=r"above .* a spike after 2 rollbacks, as many as run\.spike_rollback allows"):
        trainer.run(STEPS)
    events = [record for record in records(out) if "spike_step" in record]
    assert [(event["step"], event["spike_step"], event["skipped_batches"]) for event in events] == [
        (10, 21, 14),
        (10, 13, 6),
    ]
    newest = checkpoints.read_newest(trainer.folder)
    assert newest is not None
    assert newest.state["spikes"]["rollbacks"] == 2


def test_without_an_older_checkpoint_training_goes_on(
    repo: Path, data: Path, tmp_path: Path, places: list[Place], caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(repo, data, tmp_path / "run", "run.checkpoint_every=100")
    trainer.state.step = 1  # so that there is no checkpoint of step 0
    spoil(trainer, {places[BEFORE]}, HIGH).run(BEFORE + 3)
    assert "no checkpoint is 6 steps older, so training goes on" in caplog.text
    assert trainer.state.spikes.rollbacks == 0
    nan = spoil(trainer_of(repo, data, tmp_path / "other", "run.checkpoint_every=100"), {places[2]}, math.nan)
    with pytest.raises(Diverged, match="the loss is nan at step 2"):  # no checkpoint is six steps older
        nan.run(5)


def test_only_regular_checkpoints_are_kept_for_a_spike(repo: Path, data: Path, tmp_path: Path) -> None:
    trainer = trainer_of(repo, data, tmp_path / "run")
    for step in range(1, 24):
        trainer.run(step)  # its last step is saved, too
    assert sorted(path.name[-2:] for path in trainer.folder.iterdir()) == ["15", "20", "23"]
    (trainer.folder / "step-00000015" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint can be read"):
        trainer._roll_back(spikes.LossSpike("the loss is high"))
