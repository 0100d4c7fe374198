"""Bytes become characters, and each token goes with its character."""

from __future__ import annotations

import random

import pytest

from blt_runtime.ids import BYTES
from blt_runtime.requests import Token
from blt_runtime.server.parts import Assembler, Offsets


def token(id: int, piece: bytes | None = None) -> Token:
    return Token(id, BYTES[id] if piece is None else piece, -1.0, (), 0.0, False)


def tokens(data: bytes) -> list[Token]:
    return [token(byte + 4) for byte in data]


def test_a_token_is_returned_with_the_character_that_it_completes() -> None:
    assembler = Assembler()
    parts = [assembler.feed(t.piece, t) for t in tokens("aé€😀".encode())]
    assert [(part.text, len(part.tokens)) for part in parts if part] == [("a", 1), ("é", 2), ("€", 3), ("😀", 4)]
    assert not assembler.flush()


def test_a_tail_becomes_a_replacement_character() -> None:
    assembler = Assembler()
    assert not assembler.feed(b"\xe2", token(0xE2 + 4))
    rest = assembler.flush()
    assert (rest.text, len(rest.tokens)) == ("�", 1)


def test_tokens_of_held_bytes_wait_for_them() -> None:
    assembler = Assembler()
    assert not assembler.feed(b"", token(ord("a") + 4, b""))
    part = assembler.feed(b"ab", token(ord("b") + 4, b"ab"))
    assert (part.text, [t.id for t in part.tokens]) == ("ab", [ord("a") + 4, ord("b") + 4])


def test_tokens_of_a_stop_string_are_left_out() -> None:
    assembler = Assembler()
    assembler.feed(b"", token(ord("a") + 4, b""))
    assembler.feed(b"", token(ord("b") + 4, b""))
    assert not assembler.flush()


def test_a_special_id_is_returned_without_text() -> None:
    part = Assembler().feed(b"", token(2))
    assert (part.text, [t.id for t in part.tokens]) == ("", [2])


@pytest.mark.parametrize("seed", range(20))
def test_offsets_are_those_of_the_whole_text(seed: int) -> None:
    rng = random.Random(seed)
    data = b"".join(rng.choice([b"a", "é".encode(), "€".encode(), b"\xff", b"\xe2", b"\xf0\x9f"]) for _ in range(30))
    offsets = Offsets()
    found = [offsets.of(byte + 4) for byte in data]
    text = data.decode(errors="replace")
    assert found == sorted(found)
    at = 0
    for index, character in enumerate(text):  # the bytes of character `index` are those with this offset
        here = bytes(byte for byte, offset in zip(data, found, strict=True) if offset == index)
        assert here.decode(errors="replace") == character
        assert data[at : at + len(here)] == here
        at += len(here)
    assert at == len(data)
