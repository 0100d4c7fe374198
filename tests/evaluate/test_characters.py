"""The generated questions have one correct answer, which depends on the characters only."""

from __future__ import annotations

import random
import re

import pytest

from blt.evaluate.characters import OPTIONS, SHOTS, TASKS, Item, Result, items, measure
from blt.evaluate.words import WORDS


def solve(question: str) -> str:
    """The answer computed independently of the generator, from the words of the question."""
    word = re.findall(r'"([a-z]+)"', question)[0 if question.startswith("Spell") else -1]
    letters = re.findall(r'"([a-z])"', question)
    if question.endswith("backwards"):
        return "".join(reversed(word))
    if question.startswith("Spell"):
        return " ".join(word)
    if question.startswith("Put") and " after the " in question:
        return word.replace(letters[1], letters[1] + letters[0])
    if question.startswith("Leave"):
        return word.replace(letters[0], "")
    if question.startswith("Swap"):
        return word.translate(str.maketrans({letters[0]: letters[1], letters[1]: letters[0]}))
    return word.replace(letters[1], letters[0])


@pytest.mark.parametrize("task", TASKS)
def test_every_word_makes_a_question_with_enough_wrong_answers(task: str) -> None:
    for word in WORDS:
        solved = TASKS[task](word, random.Random(word))
        assert solved.answer == solve(solved.question)
        assert len(solved.wrong) >= OPTIONS - 1
        assert solved.answer not in solved.wrong
        assert {len(slip) for slip in solved.wrong} == {len(solved.answer)}


@pytest.mark.parametrize("task", TASKS)
def test_items_are_complete_and_seeded(task: str) -> None:
    found = items(task, 60, seed=3)
    assert found == items(task, 60, seed=3)
    assert found[:20] == items(task, 20, seed=3)
    assert found != items(task, 60, seed=4)
    assert {item.answer for item in found} == set(range(OPTIONS))
    for item in found:
        *shots, question = item.prompt.decode().split("\n")
        assert len(shots) == SHOTS
        assert all(shot == f"{shot.split(':')[0]}: {solve(shot.split(':')[0])}" for shot in shots)
        assert question.endswith(":")
        assert item.options[item.answer] == f" {solve(question[:-1])}\n".encode()
        assert len(set(item.options)) == OPTIONS
        assert len({len(option) for option in item.options}) == 1


def test_words_are_distinct_and_plain() -> None:
    assert len(WORDS) == len(set(WORDS)) > 400
    assert all(re.fullmatch(r"[a-z]{5,8}", word) for word in WORDS)


def knowing(text: bytes, prompt: bytes) -> float:
    """A model that answers every question correctly."""
    question = prompt.decode().split("\n")[-1][:-1]
    return 1.0 if text.decode().strip() == solve(question) else 2.0


def test_the_cheapest_option_is_the_choice() -> None:
    for task in TASKS:
        assert measure(knowing, task, items(task, 20, 0)).accuracy == 1.0


def test_random_answers_have_the_accuracy_of_chance_and_a_tie_is_wrong() -> None:
    rng = random.Random(0)
    found = items("swapping", 400, 0)
    answered = measure(lambda text, prompt: rng.random(), "swapping", found)
    assert abs(answered.accuracy - answered.chance) < 4 * answered.error
    assert measure(lambda text, prompt: 1.0, "swapping", found).right == 0


def test_accuracy_has_its_standard_error() -> None:
    result = Result("swapping", 30, 100)
    assert result.accuracy == 0.3
    assert result.error == pytest.approx((0.3 * 0.7 / 100) ** 0.5)
    assert result.chance == 0.25


def test_options_are_scored_after_the_prompt() -> None:
    seen: list[tuple[bytes, bytes]] = []

    def bits(text: bytes, prompt: bytes) -> float:
        seen.append((text, prompt))
        return float(len(seen))

    item = Item(b"Q:", (b" a\n", b" b\n", b" c\n", b" d\n"), 0)
    assert measure(bits, "spelling", [item]).right == 1
    assert seen == [(option, b"Q:") for option in item.options]
