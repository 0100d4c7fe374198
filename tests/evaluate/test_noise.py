"""Noise follows the paper's recipes and is seeded; each line sums over the bytes that it names."""

from __future__ import annotations

import random
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt.evaluate import noise
from blt.evaluate.noise import RECIPES, Pair, fitting, measure, noised, pairs
from blt_runtime.errors import UsageError

TEXT = "The quick brown fox jumps over the lazy dog, größer 東京. " * 20


def test_antspeak_is_upper_case_with_spaces() -> None:
    assert noised(b"ant speak", "antspeak", 0) == b"A N T   S P E A K"


def test_upper_case_changes_nothing_else() -> None:
    assert noised("abc, é東\n".encode(), "upper_case", 0) == "ABC, É東\n".encode()


def test_a_tenth_of_the_characters_is_dropped_and_the_rest_keeps_its_order() -> None:
    left = noised(TEXT.encode(), "drop", 1).decode()
    assert len(left) == len(TEXT) - round(len(TEXT) / 10)
    rest = iter(TEXT)
    assert all(char in rest for char in left)


def test_half_of_the_letters_change_case_and_nothing_else() -> None:
    text = "abcdefghij" * 100
    changed = noised(text.encode(), "random_case", 1).decode()
    assert changed.lower() == text
    assert 400 < sum(char.isupper() for char in changed) < 600


def test_a_fifth_of_the_characters_is_repeated_up_to_four_times() -> None:
    text = "".join(random.Random(0).sample([chr(c) for c in range(0x4E00, 0x5200)], 500))  # all distinct
    repeated = noised(text.encode(), "repeat", 1).decode()
    counts = [repeated.count(char) for char in text]
    assert "".join(char * n for char, n in zip(text, counts, strict=True)) == repeated
    assert sum(n > 1 for n in counts) == 100
    assert set(counts) == {1, 2, 3, 4}


@pytest.mark.parametrize("recipe", RECIPES)
@given(text=st.binary(max_size=60))
def test_any_bytes_can_be_noised_and_the_seed_decides(recipe: str, text: bytes) -> None:
    once = noised(text, recipe, 7)
    assert once == noised(text, recipe, 7)
    assert bool(once) == bool(text)
    high = [byte for byte in text if byte >= 0x80]
    if recipe == "upper_case" and text.isascii():
        assert once == text.upper()
    elif recipe in ("random_case", "upper_case") and not _is_utf8(text) and len(high) == 1:
        assert high[0] in once  # bytes that are not UTF-8 have no case


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_seeds_differ() -> None:
    for recipe in ("drop", "random_case", "repeat"):
        assert noised(TEXT.encode(), recipe, 1) != noised(TEXT.encode(), recipe, 2)


@given(st.text(alphabet="aé東🚀\n", max_size=200), st.integers(4, 20))
def test_pairs_are_neighbouring_pieces_cut_between_characters(text: str, size: int) -> None:
    data = text.encode()
    found = pairs([data], size, most=1000)
    for pair in found:
        assert pair.prompt.decode()
        assert size // 2 <= len(pair.completion) <= size
        assert size - 3 <= len(pair.prompt) <= size
        assert pair.completion.decode() is not None
    assert data.startswith(b"".join(pair.prompt + pair.completion for pair in found))


def test_cutting_bytes_that_are_not_text_into_pairs_ends() -> None:
    found = pairs([b"\x80" * 100], 10, 1000)
    assert [len(pair.prompt + pair.completion) for pair in found] == [20] * 5


@pytest.mark.parametrize("size", [-1, 0, 3])
def test_pieces_that_may_hold_no_character_are_refused(size: int) -> None:
    """Cutting between characters would not advance."""
    with pytest.raises(UsageError, match="pieces of 4 bytes or more"):
        pairs(["🚀🚀🚀".encode()], size, 10)
    assert pairs(["🚀🚀🚀".encode()], 4, 10) == [Pair("🚀".encode(), "🚀".encode())]


def test_fewer_pairs_are_spread_over_all_texts() -> None:
    texts = [bytes([65 + i]) * 40 for i in range(10)]
    assert {pair.prompt[:1] for pair in pairs(texts, 10, most=5)} == {b"A", b"C", b"E", b"G", b"I"}


def by_zlib(text: bytes, prompt: bytes) -> float:
    """A model that uses the prompt: the bits that the text adds when it is deflated after the prompt."""
    return 8.0 * (len(zlib.compress(prompt + text, 9)) - len(zlib.compress(prompt, 9)))


def test_the_sums_are_of_the_completions() -> None:
    chosen = [Pair(b"hello ", b"world"), Pair(b"one two ", b"three four")]
    lines = measure(lambda text, prompt: float(len(text)), chosen, seed=0)
    found = {(line.recipe, line.where): line for line in lines}
    assert len(found) == 1 + 3 * len(RECIPES)
    assert found["clean", ""].n_bytes == found["clean", ""].n_clean == 15
    ants = found["antspeak", "both"]
    assert (ants.n_bytes, ants.n_clean, ants.bits) == (9 + 19, 15, 9.0 + 19.0)
    assert (ants.bits_per_byte, ants.bits_per_clean_byte) == (1.0, 28 / 15)
    assert found["antspeak", "prompt"].bits == 15.0
    rises = [(9 - 5) / 5, (19 - 10) / 10]
    assert ants.worse == pytest.approx(rises)
    assert ants.error == pytest.approx(abs(rises[0] - rises[1]) / 2)


def test_prompt_and_completion_get_the_noise_that_the_line_names() -> None:
    seen: list[tuple[bytes, bytes]] = []

    def bits(text: bytes, prompt: bytes) -> float:
        seen.append((prompt, text))
        return 1.0

    measure(bits, [Pair(b"ab", b"cd")], seed=0)
    assert seen[0] == (b"ab", b"cd")
    assert seen[1:4] == [(b"A B", b"cd"), (b"ab", b"C D"), (b"A B", b"C D")]
    assert seen[-3:] == [(b"AB", b"cd"), (b"ab", b"CD"), (b"AB", b"CD")]


def test_pairs_that_noise_makes_too_long_are_left_out() -> None:
    short, long = Pair(b"ab", b"cd"), Pair(b"abcd", b"efgh")
    assert fitting([short, long], 2 * 3, seed=0) == [short]
    assert fitting([short, long], 2 * 7, seed=0) == [short, long]


def test_a_model_of_the_prompt_suffers_from_noise_in_it() -> None:
    sentence = b"patches scale better than tokens, and bytes are all there is to read; "
    lines = measure(by_zlib, [Pair(sentence * 3, sentence * 2)] * 3, seed=0)
    found = {(line.recipe, line.where): line for line in lines}
    for recipe in RECIPES:
        assert found[recipe, "prompt"].bits > found["clean", ""].bits
    assert noise.WHERE == ("prompt", "completion", "both")
