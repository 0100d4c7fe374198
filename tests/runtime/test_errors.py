"""Errors: one process passes them to another, so they must survive pickling."""

from __future__ import annotations

import pickle
import tomllib
from pathlib import Path

import pytest

from blt_runtime import errors
from blt_runtime.errors import RUNTIME_EXTRAS, BltError, MissingExtra

PLAIN = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, BltError)]


@pytest.mark.parametrize("kind", [kind for kind in PLAIN if kind is not MissingExtra])
def test_errors_survive_pickling(kind: type[BltError]) -> None:
    again = pickle.loads(pickle.dumps(kind("what, and what to do")))
    assert (type(again), str(again), again.exit_code) == (kind, "what, and what to do", kind.exit_code)


def test_a_missing_extra_survives_pickling() -> None:
    error = MissingExtra("tensorboard", "tensorboard")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.exit_code) == (MissingExtra, str(error), 4)


def test_a_missing_extra_names_its_distribution() -> None:
    assert str(MissingExtra("uvicorn", "serve")) == "uvicorn is not installed: pip install 'blt-runtime[serve]'"
    assert str(MissingExtra("gguf", "gguf")) == "gguf is not installed: pip install 'blt-lm[gguf]'"


def test_the_runtimes_extras_are_those_of_its_distribution(repo: Path) -> None:
    project = tomllib.loads((repo / "runtime/pyproject.toml").read_text())["project"]
    assert set(RUNTIME_EXTRAS) == set(project["optional-dependencies"])
