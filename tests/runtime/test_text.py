"""Streaming text: whole characters, exact stop strings."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blt_runtime import Scheduler
from blt_runtime.backends.null import null_spec
from blt_runtime.errors import UsageError
from blt_runtime.text import StopMatcher, Utf8Stream
from tests.runtime.streams import model_of


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


def reference(whole: bytes, stops: list[bytes]) -> tuple[bytes, bool]:
    """The text before the stop string that is complete first, and whether there is one."""
    for end in range(1, len(whole) + 1):
        complete = [stop for stop in stops if whole[:end].endswith(stop)]
        if complete:
            return whole[: end - max(map(len, complete))], True
    return whole, False


def matched(pieces: Iterable[bytes], stops: list[bytes]) -> tuple[bytes, bool]:
    matcher = StopMatcher(stops)
    out = b"".join(map(matcher.feed, pieces))
    return out + matcher.flush(), matcher.stopped


def cuts(whole: bytes) -> Iterator[list[bytes]]:
    """The whole in every division into pieces."""
    places = range(1, len(whole))
    for at in itertools.chain.from_iterable(itertools.combinations(places, n) for n in range(len(whole))):
        edges = [0, *at, len(whole)]
        yield [whole[a:b] for a, b in itertools.pairwise(edges)]


@given(st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=8).map(b"".join), st.lists(small(), max_size=3))
def test_stops_do_not_depend_on_how_the_text_is_cut(whole: bytes, stops: list[bytes]) -> None:
    expected = reference(whole, stops)
    assert all(matched(pieces, stops) == expected for pieces in cuts(whole))


@given(
    st.lists(st.lists(st.sampled_from([b"a", b"b"]), max_size=4).map(b"".join), max_size=12),
    st.lists(small(), min_size=1, max_size=4),
)
def test_stops_of_long_texts_in_pieces_of_all_lengths(pieces: list[bytes], stops: list[bytes]) -> None:
    assert matched(pieces, stops) == reference(b"".join(pieces), stops)


@pytest.mark.parametrize(
    ("whole", "stops", "before"),
    [
        (b"abcd", [b"bcd", b"c"], b"ab"),  # the shorter one is complete first
        (b"abcd", [b"ab", b"abc"], b""),  # one is the prefix of the other
        (b"xabc", [b"bc", b"abc"], b"x"),  # both are complete at once
        (b"aabab", [b"abab", b"b"], b"aa"),
        (b"aaa", [b"aaaa"], b"aaa"),
        ("naïve".encode(), ["ï".encode()], b"na"),
    ],
)
def test_examples_of_overlapping_stops(whole: bytes, stops: list[bytes], before: bytes) -> None:
    for pieces in cuts(whole):
        assert matched(pieces, stops)[0] == before
    assert reference(whole, stops)[0] == before


def test_generation_ends_where_the_whole_text_would() -> None:
    """Streams and requests pass on single bytes; speculation may accept several at once."""
    model = model_of(null_spec())
    whole = b"".join(model.stream().generate(40, temperature=0, stop_at_eos=False))
    for stops in ([whole[9:14], whole[11:12]], [whole[8:10], whole[8:12]], [whole[20:23], whole[21:23]]):
        expected = reference(whole, stops)[0]
        for speculate in ("off", "lookup"):
            made = model.stream().generate(40, temperature=0, stop_at_eos=False, stop=stops, speculate=speculate)
            assert b"".join(made) == expected
        with Scheduler(model, streams=1) as scheduler:
            assert scheduler.submit("", 40, temperature=0, stop_at_eos=False, stop=stops).result() == expected


def test_a_single_stop_string() -> None:
    matcher = StopMatcher("é")
    assert matcher.feed(b"x\xc3") == b"x"
    assert matcher.feed(b"\xa9y") == b""
    assert matcher.stopped


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopMatcher(["a", ""])
