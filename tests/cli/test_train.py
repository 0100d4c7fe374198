"""`blt train` and `blt data` as commands; the training itself is tested in tests/train."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blt.checkpoint.models import load
from blt.cli import console, run
from tests.cli.calls import CONFIG

Call = Callable[..., Any]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "entropy.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("\0".join(f"document number {i}, a few words long" for i in range(60)))
    assert run(["data", "prepare", str(tmp_path / "text.txt"), "-o", str(tmp_path / "data"), "--split", "8/1/1"]) == 0
    return tmp_path / "data"


def test_dry_run_prints_and_trains_nothing(blt: Call, config: Path) -> None:
    report = json.loads(blt("train", "entropy", "-c", config, "--dry-run", "--json").text)
    assert report["schema"] == "blt.dry-run/2"
    assert report["parameters"] > 0
    assert report["parameters_by_part"] == {"entropy_model": report["parameters"]}
    assert "flops_per_byte" in blt("train", "entropy", "-c", config, "--dry-run").text
    assert [p.name for p in config.parent.iterdir()] == [config.name]


def test_dry_run_estimates_the_memory_of_several_ranks(blt: Call, config: Path, tmp_path: Path) -> None:
    def memory(*options: str | int) -> dict[str, int]:
        report = json.loads(blt("train", "entropy", "-c", config, "--dry-run", "--json", *options).text)
        found: dict[str, int] = report["memory_bytes"]
        assert found["total"] == sum(size for part, size in found.items() if part != "total")
        return found

    assert memory()["gathered"] == 0 < memory("--ranks", 2)["gathered"]
    result = blt("train", "entropy", "-c", config, "--ranks", 2, "-o", tmp_path / "run")
    assert result.code == 2
    assert "--ranks is for --dry-run" in result.err


def test_dry_run_with_data_reports_the_packing(blt: Call, config: Path, data: Path) -> None:
    result = blt("train", "entropy", "-c", config, "--data", data, "--dry-run", "--json")
    packing = json.loads(result.text)["packing"]
    assert packing["batches"] == packing["buckets"]["32"] > 0
    assert 0 <= packing["padding"] < 0.2
    assert "padding" in blt("train", "entropy", "-c", config, "--data", data, "--dry-run").text


def test_set_reaches_the_model(blt: Call, config: Path) -> None:
    def parameters(*options: str) -> int:
        report = json.loads(blt("train", "entropy", "-c", config, "--dry-run", "--json", *options).text)
        return int(report["parameters"])

    assert parameters("--set", "model.n_layers=3") > parameters()


def test_train_writes_a_model(blt: Call, config: Path, data: Path, tmp_path: Path) -> None:
    result = blt("train", "entropy", "-c", config, "--data", data, "-o", tmp_path / "run", "--seed", 1, "--threads", 1)
    assert result.code == 0, result.err
    assert result.text.strip() == str(tmp_path / "run" / "model.pt")
    assert load(tmp_path / "run").entropy is not None
    assert (tmp_path / "run" / "metrics.jsonl").read_text()


def test_json_has_the_final_numbers(blt: Call, config: Path, data: Path, tmp_path: Path) -> None:
    result = blt("train", "entropy", "-c", config, "--data", data, "-o", tmp_path / "run", "--json", "-q")
    report = json.loads(result.text)
    assert report["schema"] == "blt.train/1"
    assert report["model"] == str(tmp_path / "run" / "model.pt")
    assert report["steps"] == 3
    assert min(report[key] for key in ("bytes", "flops", "seconds", "bpb", "valid_bpb", "best_valid_bpb")) > 0
    assert result.err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["train", "blt", "-c", "{config}", "-o", "x"], 2, "blt train entropy"),
        (["train", "entropy", "-c", "{config}"], 2, "-o RUN"),
        (["train", "entropy", "-c", "{config}", "-o", "{tmp}/x"], 2, "--data"),
        (["train", "entropy", "-c", "{config}", "--dry-run", "--set", "model.n_layer=3"], 2, "n_layers"),
        (["train", "entropy", "-c", "{config}", "--dry-run", "--set", "model.n_heads=3"], 2, "model"),
        (["train", "entropy", "-c", "{config}", "-o", "{tmp}/x", "--data", "{tmp}/nothing"], 2, "nothing"),
        (["train", "entropy", "-c", "{config}", "-o", "{tmp}/x", "--device", "gpu"], 2, "cuda"),
    ],
)
def test_mistakes_are_one_line(
    blt: Call, config: Path, tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    result = blt(*(argument.format(config=config, tmp=tmp_path) for argument in arguments))
    assert result.code == code
    assert result.err.startswith("blt: error: ")
    assert result.err.count("\n") == 1
    assert words in result.err


def test_a_data_folder_is_neither_a_model_nor_a_place_for_one(
    blt: Call, config: Path, data: Path, golden: Path, tmp_path: Path
) -> None:
    before = sorted(data.iterdir())
    for arguments in (
        ["generate", data, "x"],
        ["train", "entropy", "-c", config, "--data", data, "-o", data],
        ["export", golden / "a" / "blt", "-o", data, "--force"],
    ):
        result = blt(*arguments)
        assert result.code == 2
        assert str(data) in result.err
        assert result.err.count("\n") == 1
        assert sorted(data.iterdir()) == before


def test_data_info_verify(blt: Call, data: Path) -> None:
    assert blt("data", "info", data, "--verify").code == 0
    shard = data / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[::-1])
    assert blt("data", "info", data).code == 0
    result = blt("data", "info", data, "--verify")
    assert result.code == 2
    assert "has changed" in result.err


def test_ctrl_c_exits_130(blt: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from blt.cli import inputs

    def interrupt(argument: str) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(inputs, "file_or_text", interrupt)
    assert run(["patch", "-", "--scheme", "byte"]) == 130


def test_progress_without_a_terminal_is_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "PROGRESS_EVERY_S", 0.0)
    console.start_logging()
    with console.progress("work", 10) as advance:
        advance(5)
    assert "work 50 %, 0 s left" in capsys.readouterr().err
    with console.named_steps("export", 2) as begin:
        begin("fold weights")
    assert capsys.readouterr().err == "export: step 1 of 2, fold weights\n"
    console.set_verbosity(-1)
    with console.progress("work", 10) as advance:
        advance(5)
    assert capsys.readouterr().err == ""


def test_the_tour_of_the_readme_has_six_stages_with_files_that_exist(repo: Path) -> None:
    shown = subprocess.run(["make", "-n", "tour"], cwd=repo, capture_output=True, text=True, check=True).stdout
    assert [n for n in range(1, 7) if f"{n} of 6  " in shown] == list(range(1, 7))
    configs = re.findall(r"configs/\S+", shown)
    assert configs
    assert all((repo / config).is_file() for config in configs)
    assert re.findall(r"bin/blt (\w+)", shown)[:6] == ["data", "train", "train", "export", "eval", "generate"]
    assert "make tour" in (repo / "README.md").read_text()
