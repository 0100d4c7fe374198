"""A Hugging Face folder for tests that change it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.folders import write
from tests.tiny import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tiny(), tmp_path / "hf")
