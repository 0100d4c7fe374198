"""Rows and batches as they are defined: one document, one row and one patch after another. `Loader` makes the same."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blt.data import Batch, Loader
from blt.data.batches import Int, never
from blt.data.rows import OPEN_ROWS, Rows
from blt_runtime.ids import OFFSET


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


@dataclass(frozen=True)
class SlowBlock:
    """Some documents as one sequence of tokens, their patch boundaries, and the batches of their rows.

    members: the documents in the order of their tokens.  offsets: [documents + 1], where each begins.  ids: [T].
    counted: [T], the tokens whose loss counts.  batches: the rows of each batch, longest first.
    """

    epoch: int
    number: int
    members: Int
    offsets: Int
    ids: NDArray[Any]
    counted: NDArray[np.bool_]
    boundaries: Int
    rows: Rows
    batches: list[Int]


class SlowLoader(Loader):
    """The batches of `Loader`."""

    def plan(self, epoch: int, block: int, stopped: Callable[[], bool] = never) -> SlowBlock:  # type: ignore[override]
        """The rows and batches of a block. Raises CancelledError soon after `stopped()` is true."""
        members = self._blocks(epoch)[block]
        lengths, starts = self.documents.lengths[members] + 2, self._positions(members, stopped)
        cap, patches = self.shape.buckets[-1], self.shape.patches
        whole = self.shape.pack == "documents"
        if whole:
            order, rows = pack_documents(lengths, starts, patches, cap)
            members, lengths, starts = members[order], lengths[order], [starts[i] for i in order]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        boundaries = np.concatenate([offset + positions for offset, positions in zip(offsets, starts, strict=False)])
        if not whole:
            rows = cut_rows(int(offsets[-1]), boundaries, patches=patches, cap=cap, buckets=self.shape.buckets)
        counted = self._counted_tokens(members, offsets)
        ids = np.concatenate([self.documents.ids(int(index)) for index in members])
        batches = self._group_rows(rows, self._rows_with_targets(rows, counted, (self.seed, epoch, block)))
        return SlowBlock(
            epoch,
            block,
            members=members,
            offsets=offsets,
            ids=ids,
            counted=counted,
            boundaries=boundaries,
            rows=rows,
            batches=batches,
        )

    def _positions(self, members: Int, stopped: Callable[[], bool]) -> list[Int]:
        """The patch boundaries of each document, as positions in it."""
        if self.patch_starts is None:
            return [np.empty(0, np.int64)] * len(members)
        self.patch_starts.compute(members, stopped)
        return [np.flatnonzero(self.patch_starts.starts(int(index))) for index in members]

    def _counted_tokens(self, members: Int, offsets: Int) -> NDArray[np.bool_]:
        """The tokens whose loss counts: all but BOS, prompts, and what follows `last_tokens`."""
        counted = np.ones(int(offsets[-1]), np.bool_)
        counted[offsets[:-1]] = False
        prompts = self.documents.prompt_lengths[members]
        for i in np.flatnonzero(prompts):
            counted[offsets[i] + 1 : offsets[i] + 1 + prompts[i]] = False
        if self.last_tokens is not None:
            for i in np.flatnonzero(members == self.subset[-1]):
                counted[offsets[i] + 1 + prompts[i] + self.last_tokens : offsets[i + 1]] = False
        return counted

    def _rows_with_targets(self, rows: Rows, counted: NDArray[np.bool_], seed: tuple[int, int, int]) -> Int:
        """The rows that hold a target, in the order in which they fill batches."""
        before = np.concatenate([[0], np.cumsum(counted)])
        order = np.flatnonzero(before[rows.end] > before[rows.begin + 1])
        return np.random.default_rng(seed).permutation(order) if self.shuffle else order

    def _group_rows(self, rows: Rows, order: Int) -> list[Int]:
        """The rows of every batch, longest first; the last batch may have fewer."""
        parts = [order[first : first + self.shape.rows] for first in range(0, len(order), self.shape.rows)]
        return [part[np.argsort(-rows.lengths[part], kind="stable")] for part in parts]

    def _assemble(self, block: SlowBlock, index: int) -> Batch:  # type: ignore[override]
        members = block.batches[index].tolist()
        B, P, buckets = self.shape.rows, self.shape.patches, self.shape.buckets
        bucket = buckets[int(np.searchsorted(buckets, block.rows.lengths[members[0]]))]
        ids_BN, targets_BN = np.zeros((2, B, bucket), np.int64)
        mask_BN = np.zeros((B, bucket), np.bool_)
        starts_B = np.full(B, -1, np.int64)
        tokens_B, bytes_B = np.zeros((2, B), np.int64)
        documents: list[Int] = [np.empty(0, np.int64)] * B
        lengths_BP = None if P is None else _blank_patches(B, P, bucket)
        for b, row in enumerate(members):
            begin, end = int(block.rows.begin[row]), int(block.rows.end[row])
            n = end - begin - 1
            ids_BN[b, :n], targets_BN[b, :n] = block.ids[begin : end - 1], block.ids[begin + 1 : end]
            mask_BN[b, :n], starts_B[b], tokens_B[b] = block.counted[begin + 1 : end], begin, n
            bytes_B[b] = self._n_bytes(targets_BN[b][mask_BN[b]])
            first, last = np.searchsorted(block.offsets, (begin, end - 1), side="right")
            documents[b] = block.members[first - 1 : last]
            if P is not None and lengths_BP is not None:
                lengths_BP[b] = row_patch_lengths(begin, end, block.boundaries, patches=P, n_bytes=bucket)
        return Batch(
            ids_BN, targets_BN, mask_BN, patch_lengths=lengths_BP, starts=starts_B, block=block.number,
            epoch=block.epoch, index=index, row_tokens=tokens_B, row_bytes=bytes_B, documents=tuple(documents),
            buckets=buckets,
        )  # fmt: skip

    def _n_bytes(self, targets: Int) -> int:
        table = self.documents.token_bytes
        return int((targets >= OFFSET).sum() if table is None else table[targets].sum())


def _blank_patches(rows: int, patches: int, bucket: int) -> Int:
    """Patch lengths [B, P] of blank rows."""
    lengths_BP = np.zeros((rows, patches), np.int64)
    lengths_BP[:, 0], lengths_BP[:, 1] = 1, bucket
    return lengths_BP
