"""`blt check`: the table and the JSON of a correct model, exit code 3 for another model's bundle, wrong usage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blt.checkpoint.models import save
from blt_export import export
from tests.tiny import tiny

Call = Callable[..., Any]
SHORT = ("--bytes", 200, "--row-bytes", 40, "--threads", 1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("check") / "model.pt"
    save(path, tiny())
    return path


@pytest.fixture(scope="module")
def foreign(checkpoint: Path) -> Path:
    """A bundle of the same shape with other weights."""
    out = checkpoint.parent / "bundle"
    export(tiny(seed=1), out, capacity=600, check=False)
    return out


def test_a_correct_model_passes(blt: Call, checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"A text of one's own, " * 9)
    done = blt("check", checkpoint, *SHORT, "--data", text, "--backend", "torch")
    assert done.code == 0, done.err
    assert "random calls, interleaved" in done.text
    assert "greedy, alone" in done.text
    assert "onnx" not in done.text


def test_another_models_bundle_fails_with_exit_code_3(blt: Call, checkpoint: Path, foreign: Path) -> None:
    done = blt("check", checkpoint, *SHORT, "--bundle", foreign, "--backend", "onnx", "--json")
    assert done.code == 3
    assert "differences that the tolerance does not explain" in done.err
    report = json.loads(done.text)
    assert report["schema"] == "blt.check/1"
    assert not report["ok"]
    assert report["n_bytes"] >= 200
    failed = {line["form"] for line in report["lines"] if line["failures"]}
    assert failed == {"onnx"}
    assert {line["form"] for line in report["lines"]} == {"onnx", "whole rows"}


def test_wrong_usage_is_one_line(blt: Call, checkpoint: Path, foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for arguments, words in (
        ([foreign], "give the checkpoint it was exported from"),
        ([checkpoint, "--backend", "tensorrt"], "choose from torch, onnx"),
        ([checkpoint, "--bundle", tmp_path], "no bundle there"),
        ([checkpoint, "--bundle", foreign, "--backend", "torch"], "needs --backend onnx"),
        ([checkpoint, "--data", tmp_path / "missing"], "no such file"),
        ([checkpoint, "--data", tmp_path / "empty"], "is empty"),
        ([checkpoint, "--bytes", "0"], "at least 1"),
        ([checkpoint, "--entropy-dtype", "bfloat16"], "add --backend torch"),
    ):
        done = blt("check", *arguments)
        assert done.code == 2
        assert words in done.err
        assert done.err.count("\n") == 1


class TestProvider:
    """A bundle on a provider against the CPU; `auto` chooses the CPU for the flavour ort."""

    def test_equal_results_pass(self, blt: Call, foreign: Path) -> None:
        done = blt("check", foreign, "--provider", "auto", "--bytes", 40, "--threads", 1, "--json")
        assert done.code == 0, done.err
        report = json.loads(done.text)
        assert report["schema"] == "blt.check-provider/1"
        assert (report["ok"], report["provider"], report["precision"]) == (True, "cpu", "fp32")
        assert (report["logits"], report["entropies"], report["flips"]) == (0, 0, 0)
        assert (report["positions"], report["agreement"]) == (41, report["greedy"])

    def test_the_tolerance_of_codes_is_that_of_the_arithmetic_around_them(self, blt: Call, tmp_path: Path) -> None:
        export(tiny(), tmp_path / "b", flavour="portable", precision="int4", capacity=600, check=False)
        done = blt("check", tmp_path / "b", "--provider", "auto", "--bytes", 40, "--threads", 1, "--json")
        assert done.code == 0, done.err
        report = json.loads(done.text)
        assert (report["precision"], report["tolerance"], report["logits"]) == ("fp16", 5e-3, 0)

    def test_a_checkpoint_is_a_reference(self, blt: Call, checkpoint: Path, foreign: Path) -> None:
        """Of other weights: logits differ."""
        arguments = ("--provider", "auto", "--bytes", 40, "--threads", 1, "--reference", checkpoint)
        done = blt("check", foreign, *arguments)
        assert done.code == 3
        assert "tolerance 2e-05" in done.text
        assert "have a relative error of" in done.err

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("{checkpoint}", "--provider", "webgpu"), "--provider needs a bundle: blt export"),
            (("{checkpoint}", "--reference", "{foreign}"), "--reference is for --provider"),
            (("{foreign}", "--provider", "auto", "--bytes", "9k"), "has room for 599"),
        ],
    )
    def test_wrong_usage(
        self, blt: Call, checkpoint: Path, foreign: Path, arguments: tuple[str, ...], words: str
    ) -> None:
        done = blt("check", *(a.format(checkpoint=checkpoint, foreign=foreign) for a in arguments))
        assert done.code == 2
        assert words in done.err
