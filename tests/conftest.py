"""Fixtures shared by all tests: where the golden data lies, one thread for torch."""

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
    for folder in (REPO / "tests" / "golden", REPO.parent / "shared" / "golden"):
        if (folder / "hash.json").is_file():
            return folder
    pytest.skip("golden data not found: tests/golden is not part of this checkout")
