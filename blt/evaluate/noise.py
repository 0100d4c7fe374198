"""The paper's noise recipes (section 6.1), measured by likelihood: bits per byte with noise in the prompt, the
completion or both.

The recipes change characters. A byte that is not valid UTF-8 counts as one character without case. A recipe is a
function of the text and a random generator, so the same seed gives the same noise.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from blt_runtime.errors import UsageError

Bits = Callable[[bytes, bytes], float]  # of a text, after a prompt
Recipe = Callable[[str, random.Random], str]

DROPPED, REPEATED, MOST_COPIES = 0.10, 0.20, 4
LEAST = 4  # bytes of a piece: the longest character in UTF-8


def antspeak(text: str, rng: random.Random) -> str:
    """Upper-case characters with a space between each two."""
    return " ".join(text.upper())


def drop(text: str, rng: random.Random) -> str:
    """Leaves out a tenth of the characters (rounded; at least one stays)."""
    gone = set(rng.sample(range(len(text)), min(round(DROPPED * len(text)), max(0, len(text) - 1))))
    return "".join(char for i, char in enumerate(text) if i not in gone)


def random_case(text: str, rng: random.Random) -> str:
    """Each character in upper or lower case, with equal probability."""
    return "".join(char.upper() if rng.random() < 0.5 else char.lower() for char in text)


def repeat(text: str, rng: random.Random) -> str:
    """Repeats a fifth of the characters (rounded) two, three or four times."""
    often = set(rng.sample(range(len(text)), round(REPEATED * len(text))))
    return "".join(char * rng.randint(2, MOST_COPIES) if i in often else char for i, char in enumerate(text))


def upper_case(text: str, rng: random.Random) -> str:
    """Everything in upper case."""
    return text.upper()


RECIPES: dict[str, Recipe] = {
    "antspeak": antspeak,
    "drop": drop,
    "random_case": random_case,
    "repeat": repeat,
    "upper_case": upper_case,
}
WHERE = ("prompt", "completion", "both")


def noised(text: bytes, recipe: str, seed: int) -> bytes:
    """`text` with the noise of a recipe of RECIPES; always the same for the same text and seed."""
    chars, rng = text.decode("utf-8", "surrogateescape"), random.Random(f"{recipe} {seed} ".encode() + text)
    return RECIPES[recipe](chars, rng).encode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Pair:
    """A text cut into a prompt and its completion."""

    prompt: bytes
    completion: bytes


def pairs(texts: Iterable[bytes], size: int, most: int) -> list[Pair]:
    """At most `most` pairs, evenly spread over all texts, of a prompt and a completion of up to `size` bytes each.

    Texts are cut between characters. The last pair of a text needs a full prompt and at least half a completion.
    Raises UsageError for a `size` below LEAST, the bytes of the longest character.
    """
    if size < LEAST:
        raise UsageError(f"the noise suite cuts text into pieces of {LEAST} bytes or more, not of {size}")
    found = [pair for text in texts for pair in _pairs_of(text, size)]
    every = max(1.0, len(found) / most)
    return [found[int(i * every)] for i in range(min(most, len(found)))]


def fitting(found: Iterable[Pair], capacity: int, seed: int) -> list[Pair]:
    """The pairs whose prompt and completion have at most `capacity` bytes in total under every recipe."""

    def longest(pair: Pair) -> int:
        return max(sum(len(noised(part, name, seed)) for part in (pair.prompt, pair.completion)) for name in RECIPES)

    return [pair for pair in found if longest(pair) <= capacity]


def _pairs_of(text: bytes, size: int) -> Iterator[Pair]:
    start = 0
    while start < len(text):
        middle = _between_characters(text, start + size)
        end = _between_characters(text, middle + size)
        if end - middle >= size // 2:
            yield Pair(text[start:middle], text[middle:end])
        start = end


def _between_characters(text: bytes, at: int) -> int:
    """The last index at or up to three bytes before `at` where a character begins; `at` if there is none."""
    for back in range(4):
        if at - back >= len(text) or text[at - back] & 0xC0 != 0x80:
            return min(at - back, len(text))
    return at  # not UTF-8


@dataclass
class Line:
    """Sums over pairs under one recipe. `n_bytes` counts bytes of completions as scored, `n_clean` without noise.

    worse: for each pair, bits per clean byte minus those without noise.
    """

    recipe: str
    where: str
    bits: float = 0.0
    n_bytes: int = 0
    n_clean: int = 0
    worse: list[float] = field(default_factory=list)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte as scored."""
        return self.bits / self.n_bytes

    @property
    def bits_per_clean_byte(self) -> float:
        """Bits of the completions divided by their bytes without noise, which may be more or fewer."""
        return self.bits / self.n_clean

    @property
    def rise(self) -> float:
        """Mean over pairs of the additional bits per clean byte that the noise costs."""
        return sum(self.worse) / len(self.worse)

    @property
    def error(self) -> float:
        """Standard error of the rise; 0 for a single pair."""
        n = len(self.worse)
        return math.sqrt(sum((x - self.rise) ** 2 for x in self.worse) / (n - 1) / n) if n > 1 else 0.0


def measure(bits: Bits, chosen: Sequence[Pair], *, seed: int, done: Callable[[], None] = lambda: None) -> list[Line]:
    """Bits of the completions without noise (recipe "clean"), then for each recipe with noise at each of WHERE.

    `done` is called after each pair.
    """
    clean = Line("clean", "")
    lines = {(recipe, where): Line(recipe, where) for recipe in RECIPES for where in WHERE}
    for pair in chosen:
        cost = bits(pair.completion, pair.prompt)
        _add(clean, pair, pair.completion, bits=cost, without_noise=cost)
        for recipe in RECIPES:
            prompt, completion = noised(pair.prompt, recipe, seed), noised(pair.completion, recipe, seed)
            texts = {
                "prompt": (pair.completion, prompt),
                "completion": (completion, pair.prompt),
                "both": (completion, prompt),
            }
            for where, (text, before) in texts.items():
                _add(lines[recipe, where], pair, text, bits=bits(text, before), without_noise=cost)
        done()
    return [clean, *lines.values()]


def _add(line: Line, pair: Pair, scored: bytes, *, bits: float, without_noise: float) -> None:
    line.bits += bits
    line.n_bytes += len(scored)
    line.n_clean += len(pair.completion)
    line.worse.append((bits - without_noise) / len(pair.completion))
