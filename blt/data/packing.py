"""Documents to rows to batches of a few fixed shapes.

Documents (BOS, tokens, EOS) follow each other in a seeded order.

`pack: stream`: a row has P patches of that stream, or as many as fit into the largest bucket. If the P patches would
end just past a smaller bucket, the row stops at that bucket. The next row continues where the row stopped. Nothing is
dropped: the last token of a row is only a target there and is the first input of the next row. So every token after a
BOS is a target exactly once, as in `blt eval`. (The published loader cuts rows the same way, but drops the last patch
of every row whose first patch it has to split.)

`pack: documents`: a row holds whole documents (`blt.data.rows`). In both forms, BOS and the tokens of a prompt are
inputs but not targets, and a row without any target is left out.

A batch is the next B rows of the block in a shuffled order, whatever their lengths: its text is drawn like the block's.
Within the batch, rows are ordered by length, so that micro-batches of a few rows have one of a few shapes. (Batches of
one length each would be batches of one kind of text: bytes per patch differ between code and languages.) The order of
everything follows from (seed, epoch, block). A block is a sequence of documents of about `block_tokens`; the loader's
state is three integers.
The first blocks of the first epoch are smaller: FIRST_BLOCK_TOKENS, then as many as all blocks before them. So a run of
few steps needs the patch boundaries of few documents.

Letters: B rows, N tokens of a row, P patches, T tokens of a block, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blt.data.batches import Batch, BatchShape, Int, PatchStarts, TokenSource, never
from blt.data.prefetch import Position, Prefetcher
from blt.data.rows import Rows, cut_rows, pack_documents, row_patch_lengths
from blt_runtime.errors import ConfigError, InputError
from blt_runtime.ids import OFFSET

BLOCK_TOKENS = 32 << 20
FIRST_BLOCK_TOKENS = 1 << 20
ORDER = 2
"""Version of the order of rows in batches; checkpoints of another one cannot continue."""


@dataclass(frozen=True)
class Block:
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


class Loader:
    """Endless batches (`__next__`), or one pass (`one_pass`), over documents in a seeded order.

    `state()` identifies the next batch exactly, and `restore` continues there. Batches are a function of the arguments
    and that state. `workers` threads prepare them ahead of the step (0: none), which changes no batch.
    A thread plans the next block while batches of the current one are read, if its boundaries are known or if the first
    `total_batches` batches may reach it (None: all): then the entropy model runs ahead of the step.
    Of the last document of `subset`, only the first `last_tokens` tokens count (None: all; see `first_bytes`).
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
        last_tokens: int | None = None,
        block_tokens: int = BLOCK_TOKENS,
        workers: int = 0,
        total_batches: int | None = None,
    ):
        if (shape.patches is None) != (patch_starts is None):
            raise ConfigError("a batch shape with patches needs patch boundaries, and one without takes none")
        self.documents, self.shape, self.patch_starts = documents, shape, patch_starts
        self.seed, self.shuffle, self.block_tokens = seed, shuffle, block_tokens
        self.last_tokens, self.total_batches = last_tokens, total_batches
        self.subset = np.arange(len(documents)) if subset is None else np.asarray(subset, np.int64)
        if not len(self.subset):
            raise InputError("no documents to train on; look at the split with `blt data info`")
        self._epoch_blocks: tuple[int, list[Int]] = (-1, [])
        self._prefetcher: Prefetcher[Block, Batch] = Prefetcher(
            self.plan, self._assemble, self.n_blocks, workers, self._is_wanted
        )
        self.restore({"epoch": 0, "block": 0, "batch": 0})

    def state(self) -> dict[str, int]:
        """The position of the next batch."""
        return {"epoch": self.epoch, "block": self.block, "batch": self.batch}

    def restore(self, state: dict[str, int]) -> None:
        """Continues with the batch of a `state`."""
        self.epoch, self.block, self.batch = state["epoch"], state["block"], state["batch"]
        self._prefetcher.start(Position(self.epoch, self.block, self.batch))

    def close(self) -> None:
        """Stops preparing batches ahead; a later `next` starts again with the batch that is due."""
        self.restore(self.state())

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._prefetcher.take()
        self.epoch, self.block, self.batch = batch.epoch, batch.block, batch.index + 1
        return batch

    def one_pass(self) -> Iterator[Batch]:
        """The remaining batches of this epoch; the last of a block may hold blank rows."""
        epoch = self.epoch
        while self._prefetcher.has_next(epoch):
            yield next(self)
        self.restore({"epoch": epoch + 1, "block": 0, "batch": 0})

    def n_blocks(self, epoch: int) -> int:
        """The number of blocks of an epoch."""
        return len(self._blocks(epoch))

    def _blocks(self, epoch: int) -> list[Int]:
        """The epoch's documents in order, cut into blocks of about `block_tokens`."""
        cached, blocks = self._epoch_blocks
        if cached == epoch:
            return blocks
        order = self.subset
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        ends = np.cumsum(self.documents.lengths[order] + 2)
        cuts = np.searchsorted(ends, _block_ends(int(ends[-1]), self.block_tokens, growing=epoch == 0))
        blocks = [part for part in np.split(order, np.unique(cuts)) if len(part)]
        self._epoch_blocks = epoch, blocks
        return blocks

    def reached(self, batches: int) -> Int:
        """The documents of the blocks that the first `batches` batches need, whatever their patch boundaries are.

        It may be too many, and too few only if rows without a target are left out.
        """
        return np.concatenate(self._blocks(0)[: self._n_reached(batches)])

    def _n_reached(self, batches: int) -> int:
        """The number of blocks of the first epoch that the first `batches` batches need."""
        left = batches * self.shape.rows * self.shape.buckets[-1]
        for number, members in enumerate(self._blocks(0)):
            left -= int((self.documents.lengths[members] + 1).sum())
            if left < 0:
                return number + 1
        return len(self._blocks(0))

    @cached_property
    def _n_wanted(self) -> int:
        return self._n_reached(self.total_batches or 0)

    def _is_wanted(self, epoch: int, block: int) -> bool:
        """Whether a block is planned ahead: it is read for certain, or its boundaries need no entropy model."""
        if self.patch_starts is None or self.total_batches is None or (epoch == 0 and block < self._n_wanted):
            return True
        return self.patch_starts.computed(self._blocks(epoch)[block])

    def plan(self, epoch: int, block: int, stopped: Callable[[], bool] = never) -> Block:
        """The rows and batches of a block. Raises CancelledError soon after `stopped()` is true."""
        members = self._blocks(epoch)[block]
        lengths, starts = self.documents.lengths[members] + 2, self._starts(members, stopped)
        cap, patches = self.shape.buckets[-1], self.shape.patches
        whole = self.shape.pack == "documents"
        if whole:
            order, rows = pack_documents(lengths, starts, patches, cap)
            members, lengths, starts = members[order], lengths[order], [starts[i] for i in order]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        boundaries = np.concatenate([offset + positions for offset, positions in zip(offsets, starts, strict=False)])
        if not whole:
            rows = cut_rows(int(offsets[-1]), boundaries, patches=patches, cap=cap, buckets=self.shape.buckets)
        counted = self._counted(members, offsets)
        ids = np.concatenate([self.documents.ids(int(index)) for index in members])
        batches = self._group_rows(rows, self._row_order(rows, counted, (self.seed, epoch, block)))
        return Block(
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

    def _starts(self, members: Int, stopped: Callable[[], bool]) -> list[Int]:
        """The patch boundaries of each document, as positions in it."""
        if self.patch_starts is None:
            return [np.empty(0, np.int64)] * len(members)
        self.patch_starts.compute(members, stopped)
        return [np.flatnonzero(self.patch_starts.starts(int(index))) for index in members]

    def _counted(self, members: Int, offsets: Int) -> NDArray[np.bool_]:
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

    def _row_order(self, rows: Rows, counted: NDArray[np.bool_], seed: tuple[int, int, int]) -> Int:
        """The rows that hold a target, in the order in which they fill batches."""
        before = np.concatenate([[0], np.cumsum(counted)])
        order = np.flatnonzero(before[rows.end] > before[rows.begin + 1])
        return np.random.default_rng(seed).permutation(order) if self.shuffle else order

    def _group_rows(self, rows: Rows, order: Int) -> list[Int]:
        """The rows of every batch, longest first; the last batch may have fewer."""
        parts = [order[first : first + self.shape.rows] for first in range(0, len(order), self.shape.rows)]
        return [part[np.argsort(-rows.lengths[part], kind="stable")] for part in parts]

    def _assemble(self, block: Block, index: int) -> Batch:
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
            bytes_B[b] = self._bytes(targets_BN[b][mask_BN[b]])
            first, last = np.searchsorted(block.offsets, (begin, end - 1), side="right")
            documents[b] = block.members[first - 1 : last]
            if P is not None and lengths_BP is not None:
                lengths_BP[b] = row_patch_lengths(begin, end, block.boundaries, patches=P, n_bytes=bucket)
        return Batch(
            ids_BN, targets_BN, mask_BN, patch_lengths=lengths_BP, starts=starts_B, block=block.number,
            epoch=block.epoch, index=index, row_tokens=tokens_B, row_bytes=bytes_B, documents=tuple(documents),
            buckets=buckets,
        )  # fmt: skip

    def _bytes(self, targets: Int) -> int:
        table = self.documents.token_bytes
        return int((targets >= OFFSET).sum() if table is None else table[targets].sum())


def _block_ends(tokens: int, block_tokens: int, growing: bool) -> Int:
    """Where the blocks of an epoch end, in tokens from its start; the last block ends with the epoch."""
    first = [FIRST_BLOCK_TOKENS << i for i in range(block_tokens.bit_length())] if growing else []
    first = [end for end in first if end < block_tokens]
    return np.array([*first, *range(block_tokens, tokens, block_tokens)], np.int64)


def _blank_patches(rows: int, patches: int, bucket: int) -> Int:
    """Patch lengths [B, P] of blank rows."""
    lengths_BP = np.zeros((rows, patches), np.int64)
    lengths_BP[:, 0], lengths_BP[:, 1] = 1, bucket
    return lengths_BP
