"""The questions of benchmarks/languages.py, and how answers are chosen."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from blt.evaluate.scoring import Scored, Scorer, Unit


@pytest.fixture(scope="module")
def languages(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("languages")


@pytest.fixture
def pages() -> dict[str, dict[str, str]]:
    english = {f"lohelp/{i}": f"English page {i}" for i in range(12)} | {"gnome/1": "A page of another source"}
    ours = {key: f"ಪುಟ {key} " * 40 for key in english if key != "lohelp/3"} | {"lohelp/4": "English page 4"}
    return {"en": english, "ta": ours}


class Knows(Scorer):
    """Gives a completion fewer bits after the prompt that names it; the first page is likely after every prompt."""

    unit: Unit = "byte"
    capacity = None

    def measure(self, text: bytes, prompt: bytes = b"", eos: bool = False, before: bytes = b"") -> Scored:
        number = prompt.decode().strip().rsplit(" ", 1)[-1]
        bits = 1.0 if b"lohelp/0 " in text else 100.0
        return Scored(bits - (f"/{number} ".encode() in text), 1, False)


def test_a_question_has_the_translation_and_other_pages_of_the_language(
    languages: ModuleType, pages: dict[str, dict[str, str]]
) -> None:
    asked = list(languages.questions(pages, "ta"))
    assert asked == list(languages.questions(pages, "ta"))
    assert len(asked) == 11  # without the page that has no translation, and the one that was left in English
    for question in asked:
        assert len(question.completions) == 1 + languages.WRONG
        assert all(len(text) <= languages.COMPLETION and text.decode() for text in question.completions)
        number = question.prompt.decode().strip().rsplit(" ", 1)[-1]
        right = "gnome/1" if number == "source" else f"lohelp/{number}"
        assert question.completions[0].decode().startswith(f"ಪುಟ {right} ")
    office = [q for q in asked if b"English page" in q.prompt]
    assert not any(b"gnome" in text for q in office for text in q.completions), "wrong pages are of the same source"


def test_the_completion_that_the_prompt_helps_most_is_chosen(
    languages: ModuleType, pages: dict[str, dict[str, str]]
) -> None:
    """And not the one that is likely anyway."""
    asked = [q for q in languages.questions(pages, "ta") if b"English page" in q.prompt]
    alone: dict[bytes, float] = {}
    assert [languages.chosen(Knows(), question, alone) for question in asked] == [0] * 10
    assert set(alone) >= {question.completions[0] for question in asked}


def test_tables_have_every_language(languages: ModuleType, pages: dict[str, dict[str, str]]) -> None:
    asked = list(languages.questions(pages, "ta"))
    row = {"model": "BPE", "bits": {"en": 2.0, "ta": 1.0}, "right": {"ta": 0.25}}
    lines = languages.tables([row], asked)
    assert lines[2].startswith("| BPE | 2.000 |")
    assert lines[-1] == f"| BPE | 0.250 |{'  |' * 9} 0.250 |"
    assert {line.count("|") for line in lines if line} == {13}
