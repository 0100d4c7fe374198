"""Streaming text: whole characters, exact stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt_runtime.errors import UsageError
from blt_runtime.text import StopMatcher, Utf8Stream


def test_characters_are_complete() -> None:
    text = Utf8Stream()
    assert [text.feed(bytes([b])) for b in "é🚀a".encode()] == ["", "é", "", "", "", "🚀", "a"]
    assert text.flush() == ""


def test_a_tail_that_never_completes_is_replaced() -> None:
    text = Utf8Stream()
    assert text.feed(b"a\xf0\x9f\x9a") == "a"
    assert text.flush() == "�"


@given(st.binary(), st.integers(1, 5))
def test_pieces_equal_the_whole(data: bytes, size: int) -> None:
    text = Utf8Stream()
    pieces = [text.feed(data[i : i + size]) for i in range(0, len(data), size)]
    assert "".join(pieces) + text.flush() == data.decode("utf-8", errors="replace")


def small() -> st.SearchStrategy[bytes]:
    return st.lists(st.sampled_from([b"a", b"b"]), min_size=1, max_size=4).map(b"".join)


@given(st.lists(st.sampled_from([b"a", b"b", b""]), max_size=30), st.lists(small(), max_size=3))
def test_stops_equal_a_search_byte_by_byte(pieces: list[bytes], stops: list[bytes]) -> None:
    matcher, out = StopMatcher(stops), b""
    for piece in pieces:
        out += matcher.feed(piece)
        if matcher.stopped:
            break
    out += matcher.flush()
    whole = b"".join(pieces)
    first = next((i for i in range(len(whole) + 1) if any(whole[:i].endswith(s) for s in stops)), None)
    if first is None:
        assert (out, matcher.stopped) == (whole, False)
    else:
        longest = max(len(s) for s in stops if whole[:first].endswith(s))
        assert (out, matcher.stopped) == (whole[: first - longest], True)


def test_a_single_stop_string() -> None:
    matcher = StopMatcher("é")
    assert matcher.feed(b"x\xc3") == b"x"
    assert matcher.feed(b"\xa9y") == b""
    assert matcher.stopped


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopMatcher(["a", ""])
