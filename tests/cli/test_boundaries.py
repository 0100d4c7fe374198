"""`blt data boundaries`: the rule it stores, tasks and ranks, its report, its errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blt.cli import run
from blt.data import boundaries, prepare
from blt.data.boundaries import Plan
from tests.cli.calls import CONFIG

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, several shards, and `entropy`, a run."""
    folder = tmp_path_factory.mktemp("boundaries")
    text = "\0".join(f"document number {i}, a few words long, as the {i % 7} before" for i in range(400))
    (folder / "text.txt").write_text(text)
    prepare([folder / "text.txt"], folder / "data", split=(80, 10, 10), shard_bytes=4000)
    (folder / "entropy.yaml").write_text(CONFIG)
    words = ["train", "entropy", "-c", folder / "entropy.yaml", "--data", folder / "data", "-o", folder / "entropy"]
    assert run([str(word) for word in words]) == 0
    return folder


def arguments(made: Path, *more: object) -> list[object]:
    return ["data", "boundaries", made / "data", "--entropy-model", made / "entropy", "--device", "cpu", *more]


def plan_in(folder: Path) -> Plan:
    return boundaries.read_plan(folder)


def test_tasks_fill_a_folder_and_report_it(blt: Call, made: Path, tmp_path: Path) -> None:
    words = arguments(made, "-o", tmp_path / "out", "--mean-patch", "3.5", "--json")
    first = json.loads(blt(*words, "--task", "1/2").text)
    assert first["schema"] == "blt.boundaries/1"
    assert first["missing_shards"] == (first["shards"] + first["missing_shards"] + 1) // 2
    last = json.loads(blt(*words, "--task", "0/2").text)
    plan = plan_in(tmp_path / "out")
    assert (last["missing_shards"], last["shards"]) == (0, len(plan.names()))
    assert last["bytes_per_patch"] == pytest.approx(3.5, rel=0.05)
    assert last["threshold"] == plan.rule.threshold
    assert first["computed"]["tokens"] + last["computed"]["tokens"] == sum(s.tokens for _, s in plan.names())
    assert blt(*words[:-1]).text.splitlines()[-3].split() == ["tokens", "0"]


def test_ranks_share_the_shards(blt: Call, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = arguments(made, "-o", tmp_path / "out", "--threshold", "1.5", "--json")
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = []
    for rank in "201":
        monkeypatch.setenv("RANK", rank)
        done.append(json.loads(blt(*words).text))
    assert min(report["computed"]["tokens"] for report in done) > 0
    assert [report["missing_shards"] > 0 for report in done] == [True, True, False]
    assert "use one of them" in blt(*words, "--task", "0/2").err
    monkeypatch.setenv("RANK", "3")
    assert blt(*words).code == 2


def test_the_rule_is_that_of_a_configuration_or_of_options(blt: Call, made: Path, tmp_path: Path, repo: Path) -> None:
    config = ["-c", repo / "configs" / "tiny.yaml", "--set", "patching.max_patch_length=7"]
    asked: dict[str, tuple[list[object], dict[str, object]]] = {
        "config": ([*config, "--set", "patching.target_patch_size=3"], {"max_patch_length": 7, "monotonic": False}),
        "over": ([*config, "--threshold", "1.5", "--rule", "monotonic"], {"threshold": 1.5, "monotonic": True}),
        "options": (["--threshold", "2", "--max-patch-length", "5"], {"threshold": 2.0, "max_patch_length": 5}),
    }
    for name, (options, expected) in asked.items():
        done = blt(*arguments(made, "-o", tmp_path / name, *options, "--splits", "valid"))
        assert done.code == 0, done.err
        plan = plan_in(tmp_path / name)
        assert expected.items() <= plan.rule.to_dict().items()
        assert list(plan.shards) == ["valid"]
    assert plan_in(tmp_path / "config").target_patch_size == 3


def test_bfloat16_prints_the_flips(blt: Call, made: Path, tmp_path: Path) -> None:
    words = arguments(made, "-o", tmp_path / "out", "--mean-patch", "3.5", "--dtype", "bf16", "--splits", "valid")
    report = json.loads(blt(*words, "--json").text)
    plan = plan_in(tmp_path / "out")
    assert plan.flips is not None
    assert report["flips"]["boundaries"] == plan.flips.boundaries > report["flips"]["lost"] + report["flips"]["new"]
    assert "flips" in blt(*words).text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dtype", "fp16"], "fp32 or bf16"),
        (["--task", "2/2"], "I from 0 to N - 1"),
        (["--task", "first"], "I from 0 to N - 1"),
        (["--rule", "local"], "global or monotonic"),
        (["--threshold", "1", "--mean-patch", "4"], "leave one of them out"),
        (["--mean-patch", "0.5"], "the patch rule"),
        (["--set", "a=b"], "-c FILE"),
        (["--splits", "train,more"], "no split 'more'"),
        (["--mean-patch", "15", "--max-patch-length", "4"], "no threshold gives patches of 15 bytes"),
    ],
)
def test_what_is_wrong_is_one_line(blt: Call, made: Path, tmp_path: Path, words: list[str], message: str) -> None:
    done = blt(*arguments(made, "-o", tmp_path / "out", *words))
    assert done.code in (1, 2)
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out" / "boundaries.json").exists()


def test_no_entropy_model_is_one_line(blt: Call, made: Path, repo: Path) -> None:
    done = blt("data", "boundaries", made / "data")
    assert "--entropy-model" in done.err
    done = blt(*arguments(made, "-c", repo / "configs" / "tiny.yaml", "--set", "patching.scheme=space"))
    assert (done.code, "follow from the text" in done.err) == (2, True)
    done = blt(*arguments(made, "-c", repo / "configs" / "tiny-entropy.yaml"))
    assert "give the configuration of a BLT" in done.err
