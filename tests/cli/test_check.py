"""`blt check`: the table and the JSON of a correct model, exit code 3 for another model's bundle, wrong usage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from blt.checkpoint.models import save
from blt.cli import models
from blt.cli.options import ModelOptions
from blt_export import export
from blt_export.verify.emulate import on_cpu
from blt_runtime import Bundle, Model
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


@pytest.fixture(scope="module")
def made(checkpoint: Path) -> Iterator[Path]:
    """A bundle in bfloat16, which the provider cuda runs."""
    out = checkpoint.parent / "bf16"
    export(tiny(), out, flavour="cuda", precision="bf16", capacity=600, check=False)
    opens = models._open_bundle
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:

        def open_bundle(path: Path, how: ModelOptions) -> Model:
            if how.provider != "cuda":
                return opens(path, how)
            model = stack.enter_context(on_cpu(Bundle.open(path)))
            model.backend.provider = "cuda"  # type: ignore[attr-defined]
            return model

        patch.setattr(models, "_open_bundle", open_bundle)
        yield out


class TestBfloat16:
    """No CPU runs it: the device is the emulation that the export compares with, and there is a reference."""

    def test_it_needs_a_reference(self, blt: Call, made: Path) -> None:
        done = blt("check", made, "--provider", "cuda")
        assert done.code == 2
        assert "is of bf16, which no CPU runs: give its checkpoint, or a bundle, as --reference" in done.err

    @pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
    def test_a_checkpoint_or_another_bundle_is_the_reference(
        self, blt: Call, made: Path, checkpoint: Path, kind: str
    ) -> None:
        if kind == "bundle":
            export(tiny(), checkpoint.parent / "own", capacity=600, check=False)
        reference = {"checkpoint": checkpoint, "bundle": checkpoint.parent / "own"}[kind]
        words = ["check", made, "--provider", "cuda", "--reference", reference, "--bytes", 60, "--threads", 1]
        report = json.loads(blt(*words, "--json").text)
        assert (report["provider"], report["precision"], report["tolerance"]) == ("cuda", "bf16", 4e-2)
        assert report["reference"] == str(reference)
        assert 1e-4 < report["logits"] < report["tolerance"]
        assert 1e-4 < report["entropies"] < report["tolerance"]
        assert report["flips"] == report["lost"] + report["new"]
        assert report["ok"] == (report["flips"] == 0)
        shown = blt(*words)
        assert f"{report['lost']} lost, {report['new']} new in 61 positions, {report['near']} near" in shown.text

    def test_boundaries_that_move_fail_and_are_counted(self, blt: Call, made: Path, foreign: Path) -> None:
        """Against other weights, whose logits differ too."""
        words = ["check", made, "--provider", "cuda", "--reference", foreign, "--bytes", 60, "--threads", 1, "--json"]
        done = blt(*words)
        assert done.code == 3
        report = json.loads(done.text)
        assert report["lost"] + report["new"] == report["flips"] > 0
        assert not report["ok"]

    def test_a_reference_in_bfloat16_is_refused(self, blt: Call, made: Path) -> None:
        done = blt("check", made, "--provider", "cuda", "--reference", made)
        assert done.code == 4
        assert "is of bf16, which has no kernels on CPUs" in done.err
