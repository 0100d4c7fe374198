"""The packing report agrees with the batches, and row lengths are chosen once for a run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blt.data import Batch
from blt.train import Trainer, train
from blt.train.batching import packing_report
from blt.train.config import load_config
from blt.train.inputs import prepare_inputs
from blt.train.metrics import MetricWindow
from blt.train.setup import prepare_run

SPACE = ["patching.scheme=space", "patching.max_patch_length=8"]


def one_epoch(trainer: Trainer) -> list[Batch]:
    return list(trainer.state.loader.one_pass())


@pytest.mark.parametrize("pack", ["stream", "documents"])
@pytest.mark.parametrize("kind", ["tiny", "tiny-entropy"])
def test_the_report_counts_what_the_batches_hold(repo: Path, data: Path, tmp_path: Path, kind: str, pack: str) -> None:
    options = [*(SPACE if kind == "tiny" else []), f"batch.pack={pack}"]
    loader = prepare_inputs(load_config(repo / "configs" / f"{kind}.yaml", options), data).training
    report, window = packing_report(loader, 2), MetricWindow()
    batches = [replace(batch, micro_rows=2) for batch in loader.one_pass()]
    for batch in batches:
        window.add(math.log(2) * batch.n_bytes, batch)
    found = window.summary()
    assert found["bpb"] == pytest.approx(1)
    assert found["padding"] == pytest.approx(
        sum(b.places - b.n_tokens for b in batches) / sum(b.places for b in batches)
    )
    assert report["tokens"] == sum(batch.n_tokens for batch in batches)
    assert report["batches"] == len(batches)
    assert {length: n for length, n in report["buckets"].items() if n} == found["buckets"]
    names = ("padding", "patch_padding", "patch_size") if kind == "tiny" else ("padding",)
    assert {name: report[name] for name in names} == pytest.approx({name: found[name] for name in names})


def test_a_metric_window_continues_where_it_stopped(repo: Path, data: Path) -> None:
    loader = prepare_inputs(load_config(repo / "configs" / "tiny.yaml", SPACE), data).training
    whole, first = MetricWindow(), MetricWindow()
    for _ in range(3):
        batch = next(loader)
        whole.add(100.0, batch)
        first.add(100.0, batch)
    first.skip()
    second = MetricWindow()
    second.restore(json.loads(json.dumps(first.state())))
    batch = next(loader)
    whole.add(100.0, batch)
    second.add(100.0, batch)
    found = second.summary()
    assert found.pop("skipped") == 1
    assert found.pop("bytes_per_s") > 0
    assert found == {name: value for name, value in whole.summary().items() if name != "bytes_per_s"}
    before = second.all_seconds
    second.reset()
    assert second.all_seconds >= before > 0


def test_auto_buckets_are_stored_and_found_again(repo: Path, data: Path, tmp_path: Path) -> None:
    auto = ["batch.byte_buckets=[128]", "batch.auto_buckets=3", "batch.patches=16", "schedule.warmup=1"]
    path = repo / "configs" / "tiny.yaml"
    train(load_config(path, [*SPACE, *auto, "schedule.steps=4"]), tmp_path / "run", data=data)
    batch = json.loads((tmp_path / "run" / "config.json").read_text())["batch"]
    assert batch["auto_buckets"] is None
    assert 2 <= len(batch["byte_buckets"]) <= 3
    assert batch["byte_buckets"][-1] == 128
    train(load_config(path, [*SPACE, *auto, "schedule.steps=8"]), tmp_path / "run", data=data)
    chosen = prepare_inputs(load_config(path, [*SPACE, *auto]), data)
    plain = prepare_inputs(load_config(path, [*SPACE, "batch.patches=16", "batch.byte_buckets=[128]"]), data)
    assert list(chosen.config.batch.byte_buckets) == batch["byte_buckets"]
    assert packing_report(chosen.training)["padding"] < packing_report(plain.training)["padding"]


def test_workers_change_no_weight(repo: Path, data: Path, tmp_path: Path) -> None:
    models = []
    for workers in (0, 2):
        config = load_config(repo / "configs" / "tiny.yaml", [*SPACE, f"data.workers={workers}"])
        trainer, _ = prepare_run(config, tmp_path, data)
        for _ in range(4):
            trainer.train_step()
        models.append(trainer.objective.model.state_dict())
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name])


def test_whole_documents_train(repo: Path, data: Path, tmp_path: Path) -> None:
    options = [*SPACE, "batch.pack=documents", "schedule.steps=6", "schedule.warmup=1"]
    trainer, _ = prepare_run(load_config(repo / "configs" / "tiny.yaml", options), tmp_path, data)
    losses = [trainer.train_step() for _ in range(6)]
    assert losses[-1] < losses[0]
