"""Samples of text during training: every kind of model writes, and training does not notice."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from blt.checkpoint import models
from blt.train import train
from blt.train.config import load_config

SHORT = "schedule={steps: 4, warmup: 1}"
SPARSE = ["model.hash={sizes: [2, 3], rows: 101}", "optimizer.tables=sparse"]


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def samples(text: str) -> dict[int, str]:
    return {int(step): sample for step, sample in re.findall(r"sample at step (\d+): (.*)", text)}


@pytest.mark.parametrize(
    ("name", "more"), [("tiny-entropy", []), ("tiny-entropy", SPARSE), ("tiny", []), ("tiny", SPARSE), ("tiny-bpe", [])]
)
def test_a_run_with_samples_equals_one_without(
    repo: Path,
    data: Path,
    entropy_run: Path,
    tmp_path: Path,
    name: str,
    more: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    if name == "tiny-bpe":
        pytest.importorskip("tokenizers")
    found = []
    for every in (0, 2):
        caplog.clear()
        out = tmp_path / str(every)
        settings = [SHORT, "run.log_every=1", f"run.sample_every={every}", *more]
        with caplog.at_level("INFO", "blt.train"):
            train(load_config(repo / "configs" / f"{name}.yaml", settings), out, data=data, entropy_model=entropy_run)
        assert list(samples(caplog.text)) == ([0, 2, 4] if every else [])
        saved = models.load(out)
        model = saved.blt or saved.bpe or saved.entropy
        assert model is not None
        found.append((losses(out), torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_a_resumed_run_does_not_repeat_the_first_sample(
    repo: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for steps, expected in ((2, [0, 2]), (4, [4])):
        caplog.clear()
        config = load_config(
            repo / "configs" / "tiny-entropy.yaml", [f"schedule={{steps: {steps}, warmup: 1}}", "run.sample_every=4"]
        )
        with caplog.at_level("INFO", "blt.train"):
            train(config, tmp_path / "run", data=data)
        assert list(samples(caplog.text)) == expected
        assert all(sample.isprintable() for sample in samples(caplog.text).values())
