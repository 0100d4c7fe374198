"""Running commands in the test's own process, and in a fresh one."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blt.cli import console, run
from tests.cli.calls import Result

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def blt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`blt("patch", "text")` in this process; stdin is bytes. A slow machine prints no more than a fast one."""
    monkeypatch.setattr(console, "PROGRESS_EVERY_S", math.inf)

    def call(*arguments: object, stdin: bytes = b"") -> Result:
        out, err = io.BytesIO(), io.StringIO()
        with monkeypatch.context() as streams:
            streams.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
            streams.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8", write_through=True))
            streams.setattr(sys, "stderr", err)
            code = run([str(argument) for argument in arguments])
            written = out.getvalue()  # the wrapper closes it
        return Result(code, written, err.getvalue())

    return call


@pytest.fixture
def blt_process() -> Callable[..., Result]:
    """The same in a fresh interpreter, with extra environment variables."""

    def call(*arguments: object, stdin: bytes = b"", **environment: str) -> Result:
        path = os.pathsep.join(str(REPO / part) for part in ("", "export", "runtime"))
        done = subprocess.run(
            [sys.executable, "-m", "blt.cli", *(str(argument) for argument in arguments)],
            input=stdin,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )
        return Result(done.returncode, done.stdout, done.stderr.decode())

    return call
