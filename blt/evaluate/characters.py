"""Generated tasks about the characters of words, as multiple choice by likelihood.

A prompt holds a few solved questions and then the one to answer. The model's answer is the option with the fewest bits.
All options of a question have the same number of bytes, so that their bits need no normalisation by length. Each wrong
option results from one mistake: another position, another letter, two neighbouring letters exchanged. A model without
information about characters stays near one in four.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from blt.evaluate.noise import Bits
from blt.evaluate.words import WORDS

OPTIONS, SHOTS = 4, 3


@dataclass(frozen=True)
class Solved:
    """A question, its answer, and the wrong answers that result from one mistake. All have the answer's length."""

    question: str
    answer: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """A multiple-choice question: `options` after `prompt`. The one at index `answer` is correct."""

    prompt: bytes
    options: tuple[bytes, ...]
    answer: int


def spelling(word: str, rng: random.Random) -> Solved:
    """`Spell "cat": c a t`."""
    return _solved(f'Spell "{word}"', " ".join(word), (" ".join(mistake) for mistake in _mistakes(word)))


def reversing(word: str, rng: random.Random) -> Solved:
    """`Spell "cat" backwards: tac`."""
    backwards = word[::-1]
    return _solved(f'Spell "{word}" backwards', backwards, [word, *_mistakes(backwards)])


def inserting(word: str, rng: random.Random) -> Solved:
    """`Put "x" after the "a" of "cat": caxt`; wrong: at another position."""
    at, new = rng.choice(_singles(word)), _new_letter(word, rng)
    made = [word[:i] + new + word[i:] for i in range(len(word) + 1)]
    return _solved(f'Put "{new}" after the "{word[at]}" of "{word}"', made[at + 1], made)


def deleting(word: str, rng: random.Random) -> Solved:
    """`Leave out the "a" of "cat": ct`; wrong: without another letter."""
    at = rng.choice(_singles(word))
    made = [word[:i] + word[i + 1 :] for i in range(len(word))]
    return _solved(f'Leave out the "{word[at]}" of "{word}"', made[at], made)


def swapping(word: str, rng: random.Random) -> Solved:
    """`Swap the "c" and the "t" of "cat": tac`; wrong: two others, or none."""
    i, j = sorted(rng.sample(_singles(word), 2))
    made = [_swapped(word, a, b) for a, b in combinations(range(len(word)), 2)]
    return _solved(f'Swap the "{word[i]}" and the "{word[j]}" of "{word}"', _swapped(word, i, j), [word, *made])


def substituting(word: str, rng: random.Random) -> Solved:
    """`Put "o" in place of the "a" of "cat": cot`; wrong: at another position."""
    at, new = rng.choice(_singles(word)), _new_letter(word, rng)
    made = [word[:i] + new + word[i + 1 :] for i in range(len(word))]
    return _solved(f'Put "{new}" in place of the "{word[at]}" of "{word}"', made[at], made)


TASKS: dict[str, Callable[[str, random.Random], Solved]] = {
    "spelling": spelling,
    "reversing": reversing,
    "inserting": inserting,
    "swapping": swapping,
    "deleting": deleting,
    "substituting": substituting,
}


def _solved(question: str, answer: str, wrong: Sequence[str] | Iterator[str]) -> Solved:
    return Solved(question, answer, tuple(dict.fromkeys(text for text in wrong if text != answer)))


def _mistakes(letters: str) -> Iterator[str]:
    """Two neighbouring letters exchanged, or a letter overwritten by its right neighbour."""
    for i in range(len(letters) - 1):
        yield _swapped(letters, i, i + 1)
        yield letters[:i] + letters[i + 1] + letters[i + 1 :]


def _swapped(word: str, i: int, j: int) -> str:
    return word[:i] + word[j] + word[i + 1 : j] + word[i] + word[j + 1 :]


def _singles(word: str) -> list[int]:
    """Indices of the letters that occur once in a word, so that a question can name them."""
    return [i for i, letter in enumerate(word) if word.count(letter) == 1]


def _new_letter(word: str, rng: random.Random) -> str:
    return rng.choice([letter for letter in string.ascii_lowercase if letter not in word])


def items(task: str, n: int, seed: int) -> list[Item]:
    """`n` items of a task of TASKS, always the same for a seed. A smaller `n` gives the first of them."""
    return [_item(task, random.Random(f"{task} {seed} {i}")) for i in range(n)]


def _item(task: str, rng: random.Random) -> Item:
    *shots, asked = (TASKS[task](word, rng) for word in rng.sample(WORDS, SHOTS + 1))
    options = [asked.answer, *rng.sample(asked.wrong, OPTIONS - 1)]
    rng.shuffle(options)
    examples = "".join(f"{shot.question}: {shot.answer}\n" for shot in shots)
    return Item(
        prompt=f"{examples}{asked.question}:".encode(),
        options=tuple(f" {option}\n".encode() for option in options),
        answer=options.index(asked.answer),
    )


@dataclass(frozen=True)
class Result:
    """The number of items of a task that were answered correctly, of `n`."""

    task: str
    right: int
    n: int

    @property
    def accuracy(self) -> float:
        """Share of the items."""
        return self.right / self.n

    @property
    def error(self) -> float:
        """Standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)

    @property
    def chance(self) -> float:
        """The accuracy of random answers."""
        return 1 / OPTIONS


def measure(bits: Bits, task: str, found: Sequence[Item], *, done: Callable[[], None] = lambda: None) -> Result:
    """Counts the items whose answer has fewer bits than every other option. `done` is called after each item."""
    right = 0
    for item in found:
        costs = [bits(option, item.prompt) for option in item.options]
        right += all(costs[item.answer] < cost for i, cost in enumerate(costs) if i != item.answer)
        done()
    return Result(task, right, len(found))
