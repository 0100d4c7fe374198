"""Documents to rows: cut out of one stream, or several whole documents per row.

A row is a slice [begin, end) of a block's tokens. Its last token is only a target there. The first patch of a row must
be one token long (spec section 11); a row that starts inside a patch splits it into 1 + rest.

Letters: N tokens of a row, P patches, R rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blt.data.batches import Int

OPEN_ROWS = 256
"""Rows that stay open for more documents while whole documents are packed. With the longest documents first, 256 leave
as little padding as any larger number, and one numpy call over them places a document."""


@dataclass(frozen=True)
class Rows:
    """Slices [begin, end) of a block's tokens; the last token of each is only a target."""

    begin: Int
    end: Int

    @property
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
    begin, end, here = [], [], 0
    while here < n_tokens - 1:
        stop = min(here + cap + 1, n_tokens)
        if patches is not None:
            # Patches 0 and 1 begin at `here` and `here` + 1; patch P would begin at the (P-2)-th boundary after those.
            after = int(np.searchsorted(boundaries, here + 2)) + patches - 2
            stop = min(stop, int(boundaries[after])) if after < len(boundaries) else stop
        if stop < n_tokens:
            stop = here + 1 + _nearest(stop - here - 1, buckets)
        begin.append(here)
        end.append(stop)
        here = stop - 1
    return Rows(np.array(begin, np.int64), np.array(end, np.int64))


def _nearest(length: int, buckets: Sequence[int]) -> int:
    """The bucket below if it is nearer than the one above, else `length`."""
    above = bisect_left(buckets, length)
    if 0 < above < len(buckets) and length - buckets[above - 1] < buckets[above] - length:
        return buckets[above - 1]
    return length


@dataclass(frozen=True)
class _Piece:
    """The last piece of a document, which shares a row with others; a short document is one piece.

    `cuts` are the first tokens of the document's rows; the piece begins at the last of them.
    """

    document: int
    tokens: int
    patches: int
    cuts: tuple[int, ...]


def pack_documents(lengths: Int, boundaries: list[Int], patches: int | None, cap: int) -> tuple[Int, Rows]:
    """An order of the documents (of `lengths` tokens with BOS and EOS), and rows of whole documents in that order.

    A document longer than a row is cut; other documents share the row of its last piece. `boundaries` are each
    document's patch boundaries (empty arrays if `patches` is None). Documents are placed longest first, each into the
    row that it leaves with the least room (best fit decreasing).
    """
    pieces = [_piece(d, int(n), boundaries[d], patches, cap) for d, n in enumerate(lengths)]
    pieces.sort(key=lambda piece: -piece.tokens)
    rows = _best_fit(pieces, cap + 1, patches or 0)
    order, begin, end, here = [], [], [], 0
    for row in rows:
        starts = [here + cut for cut in row[0].cuts]
        order += [piece.document for piece in row]
        here += sum(int(lengths[piece.document]) for piece in row)
        begin += starts
        end += [*(start + 1 for start in starts[1:]), here]
    return np.array(order, np.int64), Rows(np.array(begin, np.int64), np.array(end, np.int64))


def _piece(document: int, n_tokens: int, boundaries: Int, patches: int | None, cap: int) -> _Piece:
    if n_tokens <= cap + 1 and (patches is None or len(boundaries) <= patches):
        return _Piece(document, n_tokens, len(boundaries), (0,))
    rows = cut_rows(n_tokens, boundaries, patches=patches, cap=cap)
    last = int(rows.begin[-1])
    n_patches = 2 + len(boundaries) - int(np.searchsorted(boundaries, last + 2))
    return _Piece(document, n_tokens - last, n_patches, tuple(rows.begin.tolist()))


def _best_fit(pieces: list[_Piece], tokens: int, patches: int) -> list[list[_Piece]]:
    """Places pieces into rows with room for `tokens` and `patches`. A piece of a cut document opens a new row."""
    rows: list[list[_Piece]] = []
    room_2W = np.zeros((2, OPEN_ROWS), np.int64)
    row_W = np.zeros(OPEN_ROWS, np.int64)
    for piece in pieces:
        need_2 = np.array([piece.tokens, piece.patches])
        left_W = np.where((room_2W >= need_2[:, None]).all(0), room_2W[0], tokens + 1)
        place = int(left_W.argmin())
        if len(piece.cuts) > 1 or left_W[place] > tokens:
            place = int(room_2W[0].argmin())  # the fullest row is closed
            room_2W[:, place], row_W[place] = (tokens, patches), len(rows)
            rows.append([])
        rows[row_W[place]].append(piece)
        room_2W[:, place] -= need_2
    return rows


def row_patch_lengths(begin: int, end: int, boundaries: Int, patches: int, n_bytes: int) -> Int:
    """Patch lengths [P] of a row with sum `n_bytes` + 1: 1, the rest of that patch, ..., the last one plus padding."""
    first, last = np.searchsorted(boundaries, (begin + 2, end))
    starts = np.concatenate([[begin, begin + 1], boundaries[first:last], [begin + n_bytes + 1]])
    lengths = np.zeros(patches, np.int64)
    lengths[: len(starts) - 1] = np.diff(starts)
    return lengths


def row_patches(rows: Rows, boundaries: Int) -> Int:
    """The number of patches that hold a token, per row, [R]."""
    first, last = (np.searchsorted(boundaries, positions) for positions in (rows.begin + 2, rows.end))
    return np.asarray(2 + last - first)
