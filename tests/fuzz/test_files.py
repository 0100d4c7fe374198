"""The short form of `tests.fuzz.files`: a few inputs of every kind, in this process."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fuzz import files
from tests.fuzz.kinds import KINDS

INPUTS = 60
"""Of each kind; the numbers that once failed are in `FOUND`."""
FOUND = {
    "huggingface": (16,),  # a size beyond 64 bits in torch's constructor
    "model.pt": (388,),  # a tensor in the place of a number
    "data folder": (640,),  # a text in the place of an object
    "training state": (84, 101, 127, 165),  # a long name; headers that only the library refuses
    "parquet": (182,),  # a name of a column that is not UTF-8
}
NEEDED = {
    "gguf": "gguf",
    "tokenizer": "tokenizers",
    "parquet": "pyarrow",
    "safetensors": "safetensors",
    "huggingface": "safetensors",
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    disabled, threads = logging.root.manager.disable, torch.get_num_threads()
    with warnings.catch_warnings():
        files.quiet()
        yield
    logging.disable(disabled)
    torch.set_num_threads(threads)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_are_read_or_refused_with_one_line(kind: str, tmp_path: Path) -> None:
    pytest.importorskip(NEEDED.get(kind, "numpy"))
    (tmp_path / "seeds").mkdir()
    numbers = (*range(INPUTS), *FOUND.get(kind, ()))
    outcomes = [files.attempt(kind, number, tmp_path / "seeds", tmp_path / "work") for number in numbers]
    assert [f"{o.kind} {o.number}: {o.problem}" for o in outcomes if o.problem and "CPU" not in o.problem] == []
    assert sum(o.seconds > 5 for o in outcomes) == 0
    assert any(o.refused for o in outcomes)  # the mutations reach what they should


def test_what_is_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path, out: Path) -> None:
        raise KeyError("x")

    kind = KINDS["npy"]
    monkeypatch.setitem(KINDS, "npy", type(kind)(kind.seed, kind.change, read))
    (tmp_path / "seeds").mkdir()
    assert "KeyError" in files.attempt("npy", 0, tmp_path / "seeds", tmp_path / "work").problem
