"""Generated text on stdout."""

from __future__ import annotations

import io
import sys

import pytest

from blt.cli.generation import write_text

HOSTILE = [b"\x1b[2J\a", b"\xe2\x80", b"\xae", b" caf\xc3\xa9\n\t\xff"]


class Out(io.TextIOWrapper):
    """A stdout in memory, on a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        self.bytes = io.BytesIO()
        self.terminal = terminal
        super().__init__(self.bytes, encoding="utf-8")

    def isatty(self) -> bool:
        return self.terminal


def written(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    out = Out(terminal)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        write_text(HOSTILE)
    return out.bytes.getvalue().decode()


def test_a_terminal_gets_escape_sequences_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written(True, monkeypatch) == "\\x1b[2J\\x07\\u202e café\n\t\ufffd"


def test_a_file_gets_the_characters_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written(False, monkeypatch) == b"".join(HOSTILE).decode(errors="replace")
