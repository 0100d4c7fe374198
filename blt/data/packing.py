"""Documents to rows to batches of a few fixed shapes.

Documents (BOS, bytes, EOS) follow each other in a seeded order; a row takes P patches of that stream, or as many as fit
into the largest byte bucket, and the next row goes on where it stopped. Nothing is dropped: the last token of a row is
only a target there and is the first input of the next row, so every token but a block's first is a target exactly once.
(The published loader cuts rows the same way but drops the last patch of every row whose first patch it has to split.)
The first patch of a row must be one token long (spec section 11); a row that starts inside a patch splits it 1 + rest.

Rows are sorted into byte buckets, so that a batch has one of a few shapes [B, N]. The order of everything follows from
(seed, epoch, block), where a block is a run of documents of about `block_tokens`; the loader's state is three integers.

Letters: B rows, N bytes, P patches, T tokens of a block, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blt.data.batches import Batch, BatchShape, Int, PatchStarts, TokenSource
from blt_runtime.errors import ConfigError, InputError
from blt_runtime.ids import OFFSET

__all__ = ["BLOCK_TOKENS", "Batch", "BatchShape", "Loader", "PatchStarts", "TokenSource"]
BLOCK_TOKENS = 32 << 20


@dataclass(frozen=True)
class _Rows:
    """The rows of a block as slices [begin, end) of its tokens; the last token of each is only a target."""

    begin: Int
    end: Int

    @property
    def lengths(self) -> Int:
        return self.end - self.begin - 1


def cut_rows(n_tokens: int, boundaries: Int, patches: int | None, cap: int) -> _Rows:
    """Rows of at most `patches` patches and `cap` input tokens over a stream of `n_tokens`.

    `boundaries` are the ascending positions where patches begin.
    """
    begin, end, here = [], [], 0
    while here < n_tokens - 1:
        stop = min(here + cap + 1, n_tokens)
        if patches is not None:
            # Patches 0 and 1 begin at `here` and `here` + 1; patch P would begin at the (P-2)-th boundary after.
            behind = int(np.searchsorted(boundaries, here + 2)) + patches - 2
            stop = min(stop, int(boundaries[behind])) if behind < len(boundaries) else stop
        begin.append(here)
        end.append(stop)
        here = stop - 1
    return _Rows(np.array(begin, np.int64), np.array(end, np.int64))


def row_patch_lengths(begin: int, end: int, boundaries: Int, patches: int, n_bytes: int) -> Int:
    """Patch lengths [P] of a row, sum `n_bytes` + 1: 1, rest of its patch, ..., the last one long by the padding."""
    first, last = np.searchsorted(boundaries, (begin + 2, end))
    starts = np.concatenate([[begin, begin + 1], boundaries[first:last], [begin + n_bytes + 1]])
    lengths = np.zeros(patches, np.int64)
    lengths[: len(starts) - 1] = np.diff(starts)
    return lengths


@dataclass
class _Block:
    """The tokens of some documents, their patch boundaries, and the batches they are dealt into."""

    epoch: int
    number: int
    members: Int
    offsets: Int
    ids: NDArray[Any]
    counted: NDArray[np.bool_]
    boundaries: Int
    rows: _Rows
    batches: list[tuple[int, list[int]]]


class Loader:
    """Batches without end (`__next__`), or one pass (`one_pass`), over documents in a seeded order.

    `state()` and `restore` name the next batch exactly; the batches are a function of the arguments and that state.
    """

    def __init__(
        self,
        documents: TokenSource,
        shape: BatchShape,
        patch_starts: PatchStarts | None = None,
        *,
        seed: int = 0,
        shuffle: bool = True,
        subset: Sequence[int] | Int | None = None,
        block_tokens: int = BLOCK_TOKENS,
    ):
        if (shape.patches is None) != (patch_starts is None):
            raise ConfigError("a batch shape with patches needs patch boundaries, and one without takes none")
        self.documents, self.shape, self.patch_starts = documents, shape, patch_starts
        self.seed, self.shuffle, self.block_tokens = seed, shuffle, block_tokens
        self.subset = np.arange(len(documents)) if subset is None else np.asarray(subset, np.int64)
        if not len(self.subset):
            raise InputError("no documents to train on; look at the split with `blt data info`")
        self.epoch = self.block = self.batch = 0
        self._loaded: tuple[int, int, _Block] | None = None

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "block": self.block, "batch": self.batch}

    def restore(self, state: dict[str, int]) -> None:
        self.epoch, self.block, self.batch = state["epoch"], state["block"], state["batch"]

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        block = self._current()
        while self.batch >= len(block.batches):
            self.block, self.batch = self.block + 1, 0
            if self.block >= len(self._blocks(self.epoch)):
                self.epoch, self.block = self.epoch + 1, 0
            block = self._current()
        batch = self._assemble(block, self.batch)
        self.batch += 1
        return batch

    def one_pass(self) -> Iterator[Batch]:
        """The batches of the rest of this epoch; the last of a block may hold blank rows."""
        epoch = self.epoch
        while self.epoch == epoch:
            block = self._current()
            if self.batch < len(block.batches):
                yield next(self)
            elif self.block + 1 < len(self._blocks(epoch)):
                self.block, self.batch = self.block + 1, 0
            else:
                self.epoch, self.block, self.batch = epoch + 1, 0, 0

    def _current(self) -> _Block:
        key = (self.epoch, self.block)
        if self._loaded is None or self._loaded[:2] != key:
            self._loaded = (*key, self._plan(*key))
        return self._loaded[2]

    def _blocks(self, epoch: int) -> list[Int]:
        """The epoch's documents in order, cut into runs of about `block_tokens`."""
        order = self.subset
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        ends = np.cumsum(self.documents.lengths[order] + 2)
        cuts = np.searchsorted(ends, np.arange(self.block_tokens, int(ends[-1]), self.block_tokens))
        return [part for part in np.split(order, np.unique(cuts)) if len(part)]

    def _plan(self, epoch: int, block: int) -> _Block:
        members = self._blocks(epoch)[block]
        ids = np.concatenate([self.documents.ids(int(index)) for index in members])
        offsets = np.concatenate([[0], np.cumsum(self.documents.lengths[members] + 2)])
        counted = np.ones(len(ids), np.bool_)
        for begin, prompt in zip(offsets, self.documents.prompt_lengths[members], strict=False):
            counted[begin + 1 : begin + 1 + prompt] = False
        boundaries = np.empty(0, np.int64)
        if self.patch_starts is not None:
            starts = np.concatenate([self.patch_starts.starts(int(index)) for index in members])
            boundaries = np.flatnonzero(starts)
        rows = cut_rows(len(ids), boundaries, self.shape.patches, self.shape.buckets[-1])
        order = np.arange(len(rows.begin))
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch, block)).permutation(order)
        return _Block(epoch, block, members, offsets, ids, counted, boundaries, rows, self._deal(rows, order))

    def _deal(self, rows: _Rows, order: Int) -> list[tuple[int, list[int]]]:
        """(bucket, rows) of every batch. What is left at the end shares batches; the very last one gets blank rows."""
        bucket_of = np.searchsorted(self.shape.buckets, rows.lengths)
        queues: list[list[int]] = [[] for _ in self.shape.buckets]
        batches = []
        for row in order:
            bucket = int(bucket_of[row])
            queues[bucket].append(int(row))
            if len(queues[bucket]) == self.shape.rows:
                batches.append((self.shape.buckets[bucket], queues[bucket]))
                queues[bucket] = []
        left = [row for queue in queues for row in queue]
        for first in range(0, len(left), self.shape.rows):
            part = left[first : first + self.shape.rows]
            batches.append((self.shape.buckets[int(bucket_of[part].max())], part))
        return batches

    def _assemble(self, block: _Block, index: int) -> Batch:
        n_bytes, members = block.batches[index]
        B, P = self.shape.rows, self.shape.patches
        ids_BN, targets_BN = np.zeros((2, B, n_bytes), np.int64)
        mask_BN = np.zeros((B, n_bytes), np.bool_)
        starts_B = np.full(B, -1, np.int64)
        tokens_B, bytes_B = np.zeros((2, B), np.int64)
        documents: list[Int] = [np.empty(0, np.int64)] * B
        lengths_BP = None
        if P is not None:
            lengths_BP = np.zeros((B, P), np.int64)
            lengths_BP[:, 0], lengths_BP[:, 1] = 1, n_bytes
        for b, row in enumerate(members):
            begin, end = int(block.rows.begin[row]), int(block.rows.end[row])
            n = end - begin - 1
            ids_BN[b, :n], targets_BN[b, :n] = block.ids[begin : end - 1], block.ids[begin + 1 : end]
            mask_BN[b, :n], starts_B[b], tokens_B[b] = block.counted[begin + 1 : end], begin, n
            bytes_B[b] = self._bytes(targets_BN[b][mask_BN[b]])
            first, last = np.searchsorted(block.offsets, (begin, end - 1), side="right")
            documents[b] = block.members[first - 1 : last]
            if P is not None and lengths_BP is not None:
                lengths_BP[b] = row_patch_lengths(begin, end, block.boundaries, P, n_bytes)
        return Batch(
            ids_BN, targets_BN, mask_BN, lengths_BP, starts_B, block.number, block.epoch, index,
            tokens_B, bytes_B, tuple(documents),
        )  # fmt: skip

    def _bytes(self, targets: Int) -> int:
        table = self.documents.token_bytes
        return int((targets >= OFFSET).sum() if table is None else table[targets].sum())
