"""Fixtures of all tests: where the golden data lies, one thread for torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread costs more than it gives

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's top folder."""
    return REPO


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the reference's outputs (tests/golden/README.md says what each file holds)."""
    folder = REPO / "tests" / "golden"
    assert (folder / "hash.json").is_file(), "tests/golden is missing; it belongs to the checkout"
    return folder
