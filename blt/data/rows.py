"""Documents to rows: cut out of one stream, or several whole documents per row.

A row is a slice [begin, end) of a block's tokens. Its last token is only a target there. The first patch of a row must
be one token long (spec section 11); a row that starts inside a patch splits it into 1 + rest.

A row is cut or placed in about a microsecond, because the loops run over plain integers and not over arrays. The
obvious forms are in `tests/data/slow_packing.py`, and tests compare.

Letters: B rows of a batch, D documents, N tokens of a row, P patches, R rows of a block.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from blt.data.batches import Int

OPEN_ROWS = 256
"""Rows that stay open for more documents while whole documents are packed. With the longest documents first, 256 leave
as little padding as any larger number."""


@dataclass(frozen=True)
class Rows:
    """Slices [begin, end) of a block's tokens; the last token of each is only a target."""

    begin: Int
    end: Int

    @cached_property
    def lengths(self) -> Int:
        """Input tokens of each row."""
        return self.end - self.begin - 1

    def __len__(self) -> int:
        return len(self.begin)


def cut_rows(n_tokens: int, boundaries: Int, patches: int | None, cap: int, buckets: Sequence[int] = ()) -> Rows:
    """Rows of at most `patches` patches and `cap` input tokens over a stream of `n_tokens`.

    Each row continues where the previous one stopped, so every token but the first is a target once. `boundaries` are
    the ascending positions where patches begin. If a row's patches would end just past one of the lengths `buckets`,
    the row stops at that length, a few patches short, when that wastes less than padding up to the next length.
    """
    if patches is None:
        ends = list(range(1 + cap, n_tokens, cap)) + ([n_tokens] if n_tokens > 1 else [])
    else:
        ends = _patch_ends(
            n_tokens, boundaries, patches=patches, length_at=_stops(cap, buckets) if buckets else range(cap + 1)
        )
    end = np.array(ends, np.int64)
    return Rows(np.concatenate([np.zeros(min(1, len(end)), np.int64), end[:-1] - 1]), end)


def _patch_ends(n_tokens: int, boundaries: Int, patches: int, length_at: Sequence[int]) -> list[int]:
    """The ends of rows of at most `patches` patches. `length_at[n]` is where a row stops that may have n tokens."""
    at = np.ascontiguousarray(boundaries).data
    count, cap = len(at), len(length_at) - 1
    ends: list[int] = []
    here, after = 0, bisect_left(at, 2)
    while here < n_tokens - 1:
        # Patches 0 and 1 begin at `here` and `here` + 1, the next one at at[after], and patch P would at at[last].
        last = after + patches - 2
        stop = min(here + cap + 1, n_tokens)
        is_full = last < count and at[last] < stop
        if is_full:
            stop = at[last]
        if stop < n_tokens:
            length = length_at[stop - here - 1]
            is_full = is_full and length == stop - here - 1
            stop = here + 1 + length
        ends.append(stop)
        here = stop - 1
        after = last + 1 if is_full else bisect_left(at, here + 2, after, min(after + patches, count))
    return ends


def _stops(cap: int, buckets: Sequence[int]) -> list[int]:
    """Where a row stops that may have n = 0 .. `cap` tokens: at the bucket below if it is nearer than the one above,
    else at n."""
    stops = list(range(cap + 1))
    for below, above in pairwise(buckets):
        for n in range(below + 1, min(above, cap + 1)):
            if n - below < above - n:
                stops[n] = below
    return stops


@dataclass(frozen=True)
class _Piece:
    """The last piece of a document, which shares a row with others; a short document is one piece.

    `cuts` are the first tokens of the document's rows; the piece begins at the last of them.
    """

    document: int
    tokens: int
    patches: int
    cuts: tuple[int, ...] = (0,)


def pack_documents(offsets: Int, boundaries: Int, patches: int | None, cap: int) -> tuple[Int, Rows]:
    """An order of the documents, and rows of whole documents in that order.

    offsets: [D + 1], where the tokens (BOS ... EOS) of each document begin.  boundaries: the ascending positions where
    patches begin, empty if `patches` is None.

    A document longer than a row is cut; other documents share the row of its last piece. Documents are placed longest
    first, each into the row that it leaves with the least room (best fit decreasing).
    """
    lengths, places = np.diff(offsets), np.searchsorted(boundaries, offsets)
    counts = np.diff(places)
    fits = (lengths <= cap + 1) & ((counts <= patches) if patches is not None else True)
    pieces = [
        _Piece(document, n_tokens, n_patches)
        if whole
        else _last_piece(document, n_tokens, boundaries[places[document] : places[document + 1]] - offset, patches, cap)
        for document, (n_tokens, n_patches, whole, offset) in enumerate(
            zip(lengths.tolist(), counts.tolist(), fits.tolist(), offsets[:-1].tolist(), strict=True)
        )
    ]
    pieces.sort(key=lambda piece: -piece.tokens)
    rows = _best_fit(pieces, cap + 1, patches or 0)
    order, begin, end, here = [], [], [], 0
    all_lengths = lengths.tolist()
    for row in rows:
        starts = [here + cut for cut in row[0].cuts]
        order += [piece.document for piece in row]
        here += sum(all_lengths[piece.document] for piece in row)
        begin += starts
        end += [*(start + 1 for start in starts[1:]), here]
    return np.array(order, np.int64), Rows(np.array(begin, np.int64), np.array(end, np.int64))


def _last_piece(document: int, n_tokens: int, boundaries: Int, patches: int | None, cap: int) -> _Piece:
    rows = cut_rows(n_tokens, boundaries, patches=patches, cap=cap)
    last = int(rows.begin[-1])
    n_patches = 2 + len(boundaries) - int(np.searchsorted(boundaries, last + 2))
    return _Piece(document, n_tokens - last, n_patches, tuple(rows.begin.tolist()))


def _best_fit(pieces: list[_Piece], tokens: int, patches: int) -> list[list[_Piece]]:
    """Places pieces into rows with room for `tokens` and `patches`. A piece of a cut document opens a new row.

    Of OPEN_ROWS places for open rows, `room` has (tokens, place) of each, ascending.
    """
    rows: list[list[_Piece]] = []
    room = [(0, place) for place in range(OPEN_ROWS)]
    patch_room, row_of = [0] * OPEN_ROWS, [0] * OPEN_ROWS
    for piece in pieces:
        at = OPEN_ROWS
        if len(piece.cuts) == 1:
            at = bisect_left(room, (piece.tokens, -1))
            while at < OPEN_ROWS and patch_room[room[at][1]] < piece.patches:
                at += 1
        if at == OPEN_ROWS:
            at = 0  # the fullest row is closed
            place = room[at][1]
            room[at], patch_room[place], row_of[place] = (tokens, place), patches, len(rows)
            rows.append([])
        left, place = room.pop(at)
        insort(room, (left - piece.tokens, place))
        rows[row_of[place]].append(piece)
        patch_room[place] -= piece.patches
    return rows


def reordered(boundaries: Int, offsets: Int, order: Int) -> Int:
    """The boundaries after the documents at these `offsets` [D + 1] are put into the order `order` [D]."""
    places, lengths = np.searchsorted(boundaries, offsets), np.diff(offsets)
    counts = np.diff(places)[order]
    moved = np.cumsum(lengths[order]) - lengths[order] - offsets[order]
    source = np.repeat(places[order] - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
    return np.asarray(boundaries[source] + np.repeat(moved, counts))


def patch_lengths_of(
    begin: Int, first: Int, last: Int, *, boundaries: Int, patches: int, n_bytes: int
) -> NDArray[np.int32]:
    """Patch lengths [B, P] of rows, each with sum `n_bytes` + 1: 1, the rest of that patch, ..., the last one plus
    padding.

    begin: [B], where each row begins.  first, last: [B], its patches but two begin at boundaries[first:last].
    """
    lengths_BP = np.zeros((len(begin), patches), np.int32)
    end_B = begin + n_bytes + 1
    lengths_BP[:, 0], lengths_BP[:, 1] = 1, n_bytes
    split = np.flatnonzero(last > first)
    lengths_BP[split, 1] = boundaries[first[split]] - begin[split] - 1
    lengths_BP[split, last[split] - first[split] + 1] = end_B[split] - boundaries[last[split] - 1]
    for b, here, after in zip(split.tolist(), first[split].tolist(), last[split].tolist(), strict=True):
        np.subtract(boundaries[here + 1 : after], boundaries[here : after - 1], out=lengths_BP[b, 2 : after - here + 1])
    return lengths_BP


def patch_ranges(rows: Rows, boundaries: Int) -> tuple[Int, Int]:
    """The patches of a row but its first two begin at boundaries[first:last]: first and last, [R]."""
    return np.searchsorted(boundaries, rows.begin + 2), np.searchsorted(boundaries, rows.end)
