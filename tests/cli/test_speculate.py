"""`blt generate --speculate`: the same text, and the bytes per decoder pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blt.checkpoint.models import save
from tests.tiny import tiny

Call = Callable[..., Any]
TEXT = "What was said before is said again, what was said before is said "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save(path, tiny())
    return path


@pytest.mark.parametrize("how", ["auto", "decoder", "entropy", "lookup", "lookup+decoder"])
def test_the_text_is_the_same(blt: Call, model: Path, how: str) -> None:
    options = ["-n", 60, "--temperature", 0, "--ignore-eos", "--json"]
    plain = json.loads(blt("generate", model, TEXT, *options).text)
    speculated = blt("generate", model, TEXT, *options, "--speculate", how, "--stats")
    report = json.loads(speculated.text)
    assert report["text"] == plain["text"]
    assert plain["bytes_per_pass"] is None
    assert report["bytes_per_pass"] >= 1
    assert "bytes per decoder pass" in speculated.err


def test_an_unknown_drafter_is_a_usage_error(blt: Call, model: Path) -> None:
    assert blt("generate", model, TEXT, "--speculate", "magic").code == 2
