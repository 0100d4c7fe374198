"""One compiled graph per batch shape, no graph breaks, nothing compiled after the warm-up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from blt.config import load_config
from blt.train.jobs import prepare_run


def step_on_each_shape(trainer: object, wanted: int) -> set[int]:
    lengths = set()
    for _ in range(60):
        block = trainer.loader._current()  # type: ignore[attr-defined]
        if trainer.loader.batch < len(block.batches):  # type: ignore[attr-defined]
            lengths.add(block.batches[trainer.loader.batch][0])  # type: ignore[attr-defined]
        trainer.train_step()  # type: ignore[attr-defined]
        if len(lengths) == wanted:
            break
    return lengths


@pytest.mark.slow
def test_as_many_compilations_as_buckets(repo: Path, data: Path, entropy_run: Path, tmp_path: Path) -> None:
    config = load_config(repo / "configs" / "tiny.yaml", ["run.compile=true"])
    trainer, _ = prepare_run(config, tmp_path, data, entropy_run)
    torch._dynamo.reset()
    counters.clear()
    assert step_on_each_shape(trainer, 2) == {96, 128}
    assert counters["stats"]["unique_graphs"] == 2
    trainer.validate()
    for _ in range(6):
        trainer.train_step()
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.slow
def test_compiled_and_eager_steps_agree(repo: Path, data: Path, entropy_run: Path, tmp_path: Path) -> None:
    path = repo / "configs" / "tiny.yaml"
    trainers = [
        prepare_run(load_config(path, ["batch.byte_buckets=[128]"]), tmp_path, data, entropy_run, compile)[0]
        for compile in (True, False)
    ]
    for _ in range(3):
        compiled, eager = (trainer.train_step() for trainer in trainers)
        assert compiled == pytest.approx(eager, rel=1e-5)
