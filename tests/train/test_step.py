"""One step: micro-batches add up to the batch, and steps that are not finite stop the run or are skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blt.train import Trainer, checkpoints
from blt.train.config import BLTRun, EntropyRun, load_config
from blt.train.loop import MAX_SKIPPED_STEPS
from blt.train.objective import Diverged
from blt.train.setup import prepare_run
from blt_runtime.errors import ConfigError
from tests.train.small import ONE_LAYER


def trainer_of(config: BLTRun | EntropyRun, out: Path, data: Path, entropy: Path | None = None) -> Trainer:
    return prepare_run(config, out, data, entropy_model=entropy)[0]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_stops_before_the_update(
    entropy_config: EntropyRun, data: Path, tmp_path: Path, what: str
) -> None:
    trainer = trainer_of(entropy_config, tmp_path / "run", data)
    weight = trainer.objective.model.get_parameter("norm.weight")
    before = weight.detach().clone()
    if what == "loss":
        with torch.no_grad():
            weight[0] = before[0] = float("inf")
    else:
        weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(Diverged, match=rf"{what}.* step 0, epoch 0, block 0, batch 0 \(documents \d+") as caught:
        trainer.train_step()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert torch.equal(weight, before)
    assert trainer.state.step == 0


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers and arrays of tensors, and shapes that depend on values."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal")
    METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        for name in self.METHODS:
            monkeypatch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))

    def _counted(self, name: str, method: Any) -> Any:
        def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            self.found.append(name)
            return method(tensor, *arguments, **options)

        return counted

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        name = function.__name__.partition(".")[0]
        if name in self.OPERATIONS:
            self.found.append(name)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("micro_rows", [4, 1])
def test_a_step_waits_once_for_the_device(
    repo: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_rows: int
) -> None:
    settings = ["patching.scheme=space", f"batch.micro_rows={micro_rows}"]
    config = load_config(repo / "configs" / "tiny.yaml", settings)
    trainer = prepare_run(config, tmp_path / "run", data)[0]
    trainer.train_step()
    with Waits(monkeypatch) as waits:
        assert bool(torch.ones(1).sum() == 1)  # what it counts
        assert waits.found.pop(0) == "__bool__"
        waits.found.clear()
        trainer.train_step()
    assert waits.found == ["tolist"]


@pytest.mark.parametrize("micro_rows", [4, 1])
def test_validation_waits_once_for_each_batch_and_for_the_groups(
    repo: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_rows: int
) -> None:
    settings = ["patching.scheme=space", f"batch.micro_rows={micro_rows}"]
    trainer = prepare_run(load_config(repo / "configs" / "tiny.yaml", settings), tmp_path / "run", data)[0]
    assert trainer.valid is not None
    batches = sum(1 for _ in trainer.valid().one_pass())
    with Waits(monkeypatch) as waits:
        trainer.validate()
    assert waits.found.count("item") == batches
    assert waits.found.count("tolist") == 1
    assert set(waits.found) <= {"item", "tolist", "_local_scalar_dense"}


def broken_for(trainer: Trainer, steps: range) -> None:
    """Gradients of these steps are not finite."""
    nan = float("nan")
    trainer.objective.model.get_parameter("norm.weight").register_hook(
        lambda g: g * nan if trainer.state.step in steps else g
    )


def test_a_non_finite_step_is_skipped(
    entropy_config: EntropyRun, data: Path, repo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As if the batch were not there: the weights are those before, the next batch is the next."""
    config = load_config(repo / "configs" / "tiny-entropy.yaml", ["run.on_nonfinite=skip"])
    assert isinstance(config, EntropyRun)
    trainer, other = (trainer_of(config, tmp_path, data) for _ in range(2))
    broken_for(trainer, range(1, 3))
    trainer.train_step()
    before = trainer.objective.model.get_parameter("norm.weight").detach().clone()
    for _ in range(2):
        trainer.train_step()
    assert torch.equal(trainer.objective.model.get_parameter("norm.weight"), before)
    assert "step 2, epoch 0, block 0, batch 2" in caplog.text
    summary = trainer.state.window.summary()
    assert summary["skipped"] == 2
    assert trainer.state.step == 3
    assert trainer.state.bytes == trainer.state.window.bytes
    other.train_step()
    for _ in range(2):
        next(other.state.loader)
    other.state.step = 3
    assert trainer.train_step() == other.train_step()
    assert trainer.state.bytes == other.state.bytes


def test_too_many_in_a_row_stop_also_across_a_resume(data: Path, repo: Path, tmp_path: Path) -> None:
    config = load_config(repo / "configs" / "tiny-entropy.yaml", ["run.on_nonfinite=skip"])
    assert isinstance(config, EntropyRun)
    first, trainer = (trainer_of(config, tmp_path, data) for _ in range(2))
    broken_for(first, range(100))
    broken_for(trainer, range(100))
    for _ in range(MAX_SKIPPED_STEPS - 1):
        first.train_step()
    first.save()
    checkpoint = checkpoints.read_newest(first.folder)
    assert checkpoint is not None
    trainer.restore(checkpoint)
    trainer.train_step()
    with pytest.raises(Diverged, match=f"{MAX_SKIPPED_STEPS + 1} steps in a row"):
        trainer.train_step()


def test_a_line_of_skipped_steps_alone(data: Path, repo: Path, tmp_path: Path) -> None:
    """The first line of a run; the next one has numbers again."""
    settings = ["run.on_nonfinite=skip", "run.log_every=2", "run.valid_every=100", "run.checkpoint_every=100"]
    config = load_config(repo / "configs" / "tiny-entropy.yaml", settings)
    assert isinstance(config, EntropyRun)
    trainer = trainer_of(config, tmp_path, data)
    trainer.valid = None
    broken_for(trainer, range(2))
    trainer.run(4)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first.keys() == {"step", "skipped", "bytes", "flops", "seconds"}
    assert (first["step"], first["skipped"], first["bytes"]) == (2, 2, 0)
    assert {"loss", "bpb", "padding", "lr", "norm"} < second.keys()
    assert "skipped" not in second


@pytest.mark.parametrize("micro_rows", [1, 2])
def test_micro_batches_add_up(
    repo: Path, data: Path, entropy_run: Path, tmp_path: Path, micro_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, setting = repo / "configs" / "tiny.yaml", f"batch.micro_rows={micro_rows}"
    configs = (load_config(path), load_config(path, [setting]))
    whole, parts = (prepare_run(config, tmp_path, data, entropy_model=entropy_run)[0] for config in configs)
    sizes = []
    loss_sum = parts.objective._sum

    def counted(ids: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(ids))
        return loss_sum(ids, *rest)

    monkeypatch.setattr(parts.objective, "_sum", counted)
    for _ in range(3):
        assert parts.train_step() == pytest.approx(whole.train_step(), rel=1e-5)
        assert parts.state.norm == pytest.approx(whole.state.norm, rel=1e-4)
    assert sizes == [micro_rows] * (3 * 4 // micro_rows)
    assert parts.validate() == pytest.approx(whole.validate(), rel=1e-5)


@pytest.mark.parametrize("micro_rows", [3, 8])
def test_rows_that_do_not_divide(repo: Path, data: Path, tmp_path: Path, micro_rows: int) -> None:
    config = load_config(repo / "configs" / "tiny-entropy.yaml", [f"batch.micro_rows={micro_rows}"])
    assert isinstance(config, EntropyRun)
    if micro_rows > config.batch.rows:  # capped at the rows of a batch
        assert trainer_of(config, tmp_path, data).micro_rows == config.batch.rows
        return
    with pytest.raises(ConfigError, match=r"batch.rows 4 cannot be divided evenly"):
        trainer_of(config, tmp_path, data)


def saved_bytes(trainer: Trainer) -> int:
    """Bytes of activations that are kept for the backward pass of the next batch."""
    total = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        trainer.train_step()
    return total


@pytest.mark.parametrize("what", ["selective", "full"])
def test_activation_checkpointing_saves_memory_and_changes_no_bit(
    repo: Path, data: Path, entropy_run: Path, tmp_path: Path, what: str
) -> None:
    path = repo / "configs" / "tiny.yaml"
    configs = (load_config(path), load_config(path, [f"run.activation_checkpointing={what}"]))
    kept, again = (prepare_run(config, tmp_path, data, entropy_model=entropy_run)[0] for config in configs)
    assert saved_bytes(again) < 0.7 * saved_bytes(kept)
    for _ in range(2):
        assert again.train_step() == kept.train_step()
        assert again.state.norm == kept.state.norm
    names = [name for name, _ in again.objective.model.named_parameters()]
    assert names == [name for name, _ in kept.objective.model.named_parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["selective", "full"])
def test_activation_checkpointing_compiles(
    repo: Path, data: Path, entropy_run: Path, tmp_path: Path, what: str
) -> None:
    settings = [f"run.activation_checkpointing={what}", "batch.byte_buckets=[128]", *ONE_LAYER]
    config = load_config(repo / "configs" / "tiny.yaml", settings)
    compiled, eager = (
        prepare_run(config, tmp_path, data, entropy_model=entropy_run, compile=compile)[0] for compile in (True, False)
    )
    for _ in range(2):
        assert compiled.train_step() == pytest.approx(eager.train_step(), rel=1e-5)
