"""Baselines as commands: train, evaluate, inspect; a command that needs a BLT refuses them in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHORT = ["--steps", 6, "--set", "schedule.warmup=1", "--threads", 1, "-q"]


@pytest.fixture
def data(blt: Call, tmp_path: Path) -> Path:
    for split in ("train", "valid", "test"):
        (tmp_path / "in" / split).mkdir(parents=True)
        for group in ("one", "two"):
            words = "\0".join(f"{split} {group} number {i}, a few words long" for i in range(30))
            (tmp_path / "in" / split / f"{group}.txt").write_text(words)
    assert blt("data", "prepare", tmp_path / "in", "-o", tmp_path / "data", "-q").code == 0
    return tmp_path / "data"


@pytest.mark.parametrize(("kind", "unit"), [("bpe", "token"), ("entropy", None)])
def test_train_then_eval(blt: Call, data: Path, tmp_path: Path, kind: str, unit: str | None) -> None:
    run = tmp_path / "run"
    trained = blt("train", kind, "-c", CONFIGS / f"tiny-{kind}.yaml", "--data", data, "-o", run, *SHORT)
    assert trained.code == 0, trained.err
    arguments = ["eval", run, data, "--by", "group", "--baseline", "ppmd,xz", "-q"]
    report = json.loads(blt(*arguments, "--json").text)
    assert report["schema"] == "blt.eval/1"
    assert list(report["groups"]) == ["one", "two"]
    assert report["documents"] == 60
    assert report["bytes"] == sum(group["bytes"] for group in report["groups"].values())
    assert 2 < report["bits_per_byte"] < 9
    means = {key: value for key, value in report.items() if key.startswith("bytes_per_") and key != "bytes_per_s"}
    assert list(means) == ([f"bytes_per_{unit}"] if unit else [])
    table = blt(*arguments).text
    assert ("bytes/token" in table) == (unit == "token")
    assert [line.split()[0] for line in table.splitlines()] == ["group", "one", "two", "ALL"]
    inspected = json.loads(blt("inspect", run, "--json").text)
    assert inspected["parameters"]["total"] > 0


def test_commands_that_need_a_blt_refuse_a_baseline(blt: Call, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    blt("train", "bpe", "-c", CONFIGS / "tiny-bpe.yaml", "--data", data, "-o", run, *SHORT)
    for arguments in (
        ["export", run, "-o", tmp_path / "bundle"],
        ["generate", run, "text"],
        ["patch", "text", "--model", run],
        ["calibrate", run, data, "--mean-patch", 4],
        ["eval", run, data, "--backend", "onnx"],
        ["convert", run, "-o", tmp_path / "hf", "--to", "hf"],
    ):
        result = blt(*arguments)
        assert result.code == 1
        assert result.err.startswith("blt: error: ")
        assert result.err.count("\n") == 1
        assert "token-level baseline" in result.err
    assert not (tmp_path / "bundle").exists()


def test_the_dry_run_of_a_baseline(blt: Call) -> None:
    report = json.loads(blt("train", "bpe", "-c", CONFIGS / "tiny-bpe.yaml", "--dry-run", "--json").text)
    assert list(report["parameters_by_part"]) == ["token_model"]
    assert report["flops_per_byte"] > 0
    wrong = blt("train", "bpe", "-c", CONFIGS / "tiny-entropy.yaml", "--dry-run")
    assert wrong.code == 2
    assert "blt train entropy" in wrong.err


def test_a_dry_run_with_data_costs_its_own_tokens(blt: Call, data: Path) -> None:
    arguments = ["train", "bpe", "-c", CONFIGS / "tiny-bpe.yaml", "--dry-run", "--json"]
    assumed, measured = json.loads(blt(*arguments).text), json.loads(blt(*arguments, "--data", data).text)
    per_token = 4.0 * assumed["flops_per_byte"]  # of an assumed token of four bytes
    unit = per_token / measured["flops_per_byte"]
    assert measured["bytes_per_step"] == round(4 * 64 * unit)
    assert unit == pytest.approx(measured_bytes_per_token(data), rel=1e-6)


def measured_bytes_per_token(data: Path) -> float:
    from blt.data.dataset import Dataset
    from blt.data.token_cache import tokenised
    from blt.model.vocabulary import read_vocabulary

    dataset = Dataset(data)
    tokens = tokenised(dataset, "train", read_vocabulary(next((data / "tokens").glob("tokenizer-*.json"))))
    return dataset.split("train").n_bytes / int(tokens.lengths.sum())
