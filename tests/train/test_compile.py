"""One compiled graph per batch shape, no graph breaks, nothing compiled after the warm-up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from blt.train import Trainer
from blt.train.config import load_config
from blt.train.setup import prepare_run
from tests.train.small import ONE_LAYER


def step_on_each_shape(trainer: Trainer, wanted: int) -> set[int]:
    """Steps until batches of `wanted` lengths were seen; the lengths."""
    for _ in range(60):
        trainer.train_step()
        if len(trainer.state.window.buckets) == wanted:
            break
    return {int(length) for length in trainer.state.window.buckets}


@pytest.mark.slow
def test_as_many_compilations_as_buckets(repo: Path, data: Path, entropy_run: Path, tmp_path: Path) -> None:
    config = load_config(repo / "configs" / "tiny.yaml", ["run.compile=true", *ONE_LAYER])
    trainer, _ = prepare_run(config, tmp_path, data, entropy_model=entropy_run)
    torch._dynamo.reset()
    counters.clear()
    assert step_on_each_shape(trainer, 2) == {96, 128}
    assert counters["stats"]["unique_graphs"] == 2
    trainer.validate()
    for _ in range(6):
        trainer.train_step()
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_torch_allows_every_shape_of_a_run(repo: Path, data: Path, tmp_path: Path) -> None:
    """Torch's default limit of 8 compilations would end a run that needs a whole graph. Nothing is compiled here."""
    settings = torch._dynamo.config
    with settings.patch(recompile_limit=8, accumulated_recompile_limit=16):
        config = load_config(repo / "configs" / "tiny.yaml", ["patching.scheme=space"])
        prepare_run(config, tmp_path, data, compile=True)
        assert settings.recompile_limit >= 6 * 32
        assert settings.accumulated_recompile_limit >= settings.recompile_limit


@pytest.mark.slow
def test_compiled_and_eager_steps_agree(repo: Path, data: Path, entropy_run: Path, tmp_path: Path) -> None:
    path = repo / "configs" / "tiny.yaml"
    config = load_config(path, ["batch.byte_buckets=[128]", *ONE_LAYER])
    trainers = [
        prepare_run(config, tmp_path, data, entropy_model=entropy_run, compile=compile)[0] for compile in (True, False)
    ]
    for _ in range(3):
        compiled, eager = (trainer.train_step() for trainer in trainers)
        assert compiled == pytest.approx(eager, rel=1e-5)
