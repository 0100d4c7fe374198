"""Text to evaluate: limits, pieces, and the ends of documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from blt.cli import run
from blt.evaluate.scoring import Scored
from blt.evaluate.texts import Document, cut, limited
from tests.tiny import tiny


def pieces(documents: list[Document], limit: int | None, context: int) -> list[tuple[bytes, bytes, bool]]:
    return [piece[:3] for document in limited(documents, limit) for piece in cut(document, context)]


def test_a_piece_knows_the_byte_before_it() -> None:
    assert [piece.before for piece in cut(Document("a", b"12345678", prompt=4), 3)] == [b"3", b"6"]


def test_a_document_ends_only_where_its_text_does() -> None:
    documents = [Document("a", b"12345"), Document("a", b"abcdefgh"), Document("b", b"xyz"), Document("a", b"gone")]
    expected = [(b"", b"12345", True), (b"", b"abcd", False), (b"", b"ef", False), (b"", b"xyz", True)]
    assert pieces(documents, 11, 5) == [expected[0], (b"", b"abcde", False), (b"", b"f", False), expected[3]]
    assert pieces(documents, 11, 4)[2:] == expected[1:]
    assert pieces(documents[:2], 13, 8) == [expected[0], (b"", b"abcdefgh", True)]
    assert pieces(documents[:1], None, 8) == [expected[0]]


def test_a_limit_inside_a_prompt_leaves_nothing_to_count() -> None:
    document = Document("a", b"question answer", 9)
    assert pieces([document], 7, 100) == []
    assert pieces([document], 12, 100) == [(b"question ", b"ans", False)]
    assert pieces([document], 15, 100) == [(b"question ", b"answer", True)]


def test_eval_scores_no_end_where_the_limit_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from blt.checkpoint.models import save
    from blt.evaluate.rows import PatchRows

    save(tmp_path / "model.pt", tiny("static"))
    (tmp_path / "text").write_bytes(b"first\0the second document")
    ends: list[tuple[bytes, bool]] = []

    def measure(self: PatchRows, text: bytes, prompt: bytes = b"", eos: bool = False, before: bytes = b"") -> Scored:
        ends.append((text, eos))
        return Scored(1.0, 1, True)

    monkeypatch.setattr(PatchRows, "measure", measure)
    model, text = str(tmp_path / "model.pt"), str(tmp_path / "text")
    assert run(["eval", model, text, "--limit", "15", "--context", "600", "-q"]) == 0
    assert ends == [(b"first", True), (b"the second", False)]
