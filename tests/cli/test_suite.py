"""`blt eval --suite`: every kind of model runs it, numbers are those of `blt.evaluate`, mistakes are one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blt.checkpoint.models import Checkpoint, load, save
from blt.evaluate import characters, noise
from blt.evaluate.rows import scorer_of
from blt.model import EntropyModel
from blt.model.token import TokenConfig, TokenModel
from blt.model.vocabulary import train_vocabulary
from tests.data.source_code import code
from tests.tiny import ENTROPY, tiny

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random BLT, its entropy model without it, smaller entropy models, a token model, and some text."""
    folder = tmp_path_factory.mktemp("suite")
    both = tiny()
    save(folder / "model.pt", both)
    save(folder / "byte.pt", Checkpoint(None, both.entropy, None))
    for name, length in (("hundred", 102), ("nineteen", 21)):
        small = EntropyModel(ENTROPY.model_copy(update={"max_seqlen": length}))
        small.init_weights(torch.Generator().manual_seed(0))
        save(folder / f"{name}.pt", Checkpoint(None, small, None))
    vocabulary = train_vocabulary([code(3 << 10)], 280)
    bpe = TokenModel(TokenConfig(dim=16, n_layers=1, n_heads=2, ffn_dim=32, max_seqlen=640, vocab_size=280))
    bpe.init_weights(torch.Generator().manual_seed(0))
    save(folder / "bpe.pt", Checkpoint(None, None, None, bpe.eval(), vocabulary))
    (folder / "text").write_bytes(code(3 << 10))
    (folder / "short").write_bytes(b"a few words")
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["model", "byte", "bpe"])
def test_the_report_has_the_numbers_of_the_suites(blt: Call, files: dict[str, Path], name: str) -> None:
    result = blt("eval", files[name], files["text"], "--suite", "all", "--items", 2, "--seed", 5, "--json", "-q")
    assert result.code == 0, result.err
    report = json.loads(result.text)
    assert report["schema"] == "blt.suite/1"
    scorer = scorer_of(load(files[name]), 5 * 256 + 2)
    assert scorer.capacity is not None
    size = report["noise"]["pair_bytes"]
    assert size == (256 if name == "model" else 127)  # a BLT is read as a stream of any length, the others hold 638
    chosen = noise.fitting(noise.pairs([files["text"].read_bytes()], size, 2), scorer.capacity, 5)
    lines = noise.measure(scorer.bits, chosen, seed=5)
    assert report["noise"]["pairs"] == len(chosen) == 2
    assert [line["bits_per_byte"] for line in report["noise"]["lines"]] == [
        pytest.approx(line.bits_per_byte, abs=1e-4) for line in lines
    ]
    swapping = characters.measure(scorer.bits, "swapping", characters.items("swapping", 2, 5))
    tasks = {task["task"]: task for task in report["characters"]["tasks"]}
    assert list(tasks) == list(characters.TASKS)
    assert tasks["swapping"]["right"] == swapping.right
    assert {task["chance"] for task in tasks.values()} == {0.25}


@pytest.mark.slow
def test_a_bundle_gives_what_its_checkpoint_gives(blt: Call, files: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    arguments = ["--no-check", "--capacity", 1282]
    exported = blt("export", files["model"], "-o", tmp_path / "bundle", *arguments)
    assert exported.code == 0
    assert "fold" not in exported.err  # the steps are printed with -v
    assert re.search(r"^hash tables +[\d.]+ [kM]?B$", exported.text, re.MULTILINE)
    assert exported.text.count(str(tmp_path)) == 1
    found = []
    for model in (files["model"], tmp_path / "bundle"):
        result = blt("eval", model, files["text"], "--suite", "all", "--items", 1, "--json", "-q")
        assert result.code == 0, result.err
        found.append(json.loads(result.text))
    theirs, ours = found
    assert ours["noise"]["pair_bytes"] == theirs["noise"]["pair_bytes"] == 256
    for line, wanted in zip(ours["noise"]["lines"], theirs["noise"]["lines"], strict=True):
        assert line["bits_per_byte"] == pytest.approx(wanted["bits_per_byte"], rel=1e-3)
    assert len(ours["characters"]["tasks"]) == len(characters.TASKS)


def test_questions_about_characters_need_no_data(blt: Call, files: dict[str, Path]) -> None:
    result = blt("eval", files["byte"], "--suite", "characters", "--items", 3)
    assert result.code == 0, result.err
    assert [line.split()[0] for line in result.text.splitlines()] == ["task", *characters.TASKS]


def test_the_noise_table_has_every_recipe_in_every_place(blt: Call, files: dict[str, Path]) -> None:
    table = blt("eval", files["byte"], files["text"], "--suite", "noise", "--items", 2).text.splitlines()
    assert [line.split()[0] for line in table[1:-1]] == ["clean", *(r for r in noise.RECIPES for _ in noise.WHERE)]
    assert table[-1].strip() == "2 pairs, prompt and completion of up to 127 bytes each"
    again = blt("eval", files["byte"], files["text"], "--suite", "noise", "--items", 2).text.splitlines()
    assert again == table


ERRORS = [
    (["{byte}", "--suite", "tea"], 2, "choose from noise"),
    (["{byte}", "--suite", "noise"], 2, "name DATA"),
    (["{byte}"], 2, "name DATA"),
    (["{byte}", "{text}", "--suite", "all", "--by", "group"], 2, "--by has no effect with --suite"),
    (["{byte}", "{text}", "--suite", "all", "--fail-above", "0"], 2, "--fail-above has no effect"),
    (["{byte}", "{short}", "--suite", "noise"], 2, "needs longer text"),
    (["{nineteen}", "{text}", "--suite", "noise"], 2, "reads 19 bytes at once, the noise suite needs 20"),
    (["{hundred}", "--suite", "characters"], 2, "reads 100 bytes at once, questions about characters have"),
]


@pytest.mark.parametrize(("arguments", "exit_code", "words"), ERRORS)
def test_a_mistake_is_one_line(
    blt: Call, files: dict[str, Path], arguments: list[str], exit_code: int, words: str
) -> None:
    result = blt("eval", *(argument.format(**files) for argument in arguments))
    assert result.code == exit_code
    assert words in result.err
    assert result.err.count("\n") == 1
