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
The first blocks of the first epoch are smaller: FIRST_BLOCK_TOKENS by default, then as many as all blocks before them.
So a run of few steps needs the patch boundaries of few documents.

Letters: B rows, N tokens of a row, P patches, T tokens of a block, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from blt.data.batches import Batch, BatchShape, Groups, Ids, Int, PatchStarts, Share, TokenSource, never
from blt.data.mixture import Mixture
from blt.data.prefetch import Position, Prefetcher
from blt.data.rows import Rows, cut_rows, pack_documents, patch_lengths_of, patch_ranges, reordered
from blt_runtime.errors import ConfigError, InputError

Bools = NDArray[np.bool_]
BLOCK_TOKENS = 32 << 20
FIRST_BLOCK_TOKENS = 1 << 20
ORDER = 2
"""Version of the order of rows in batches; checkpoints of another one cannot continue."""


@dataclass(frozen=True)
class Block:
    """The plan of some documents: their order, patch boundaries and rows, and the batches of their rows. No text.

    members: the documents in the order of their tokens.  offsets: [D + 1], where each begins.  counted: [2, D], the
    tokens of each document from the first on and before the last whose loss counts, as positions in it.  boundaries:
    ascending, where patches begin.

    Of rows: targets: [R] counted tokens.  bytes: [R] bytes of them (None: some tokens have others than one).
    documents: [2, R] first and last + 1.  patches: [2, R], its patches but two begin at boundaries[first:last].

    batches: the rows of each batch, longest first.
    """

    epoch: int
    number: int
    members: Int
    offsets: Int
    counted: Int
    boundaries: Int
    rows: Rows
    targets: Int
    bytes: Int | None
    documents: Int
    patches: Int
    batches: list[Int]

    @property
    def n_tokens(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def n_patches(self) -> Int:
        """[R], the patches of each row."""
        return np.asarray(2 + self.patches[1] - self.patches[0])


@dataclass(frozen=True)
class _Pieces:
    """Tokens [begin, end) of documents, in the order in which they fill the rows of a batch.

    row, document: their numbers in the batch and in the block.  place: of the piece's first token in its row.
    """

    row: Int
    document: Int
    begin: Int
    end: Int
    place: Int


class Loader:
    """Endless batches (`__next__`), or one pass (`one_pass`), over documents in a seeded order.

    `state()` identifies the next batch exactly, and `restore` continues there. Batches are a function of the arguments
    and that state. `workers` threads prepare them ahead of the step (0: none), which changes no batch.
    A thread plans the next block while batches of the current one are read, if its boundaries are known or if the first
    `total_batches` batches may reach it (None: all): then the entropy model runs ahead of the step.
    A `mixture` of the documents of `subset` decides their order; without one, an epoch is a permutation of them.
    The first block of the first epoch has `first_block_tokens` (None: FIRST_BLOCK_TOKENS).
    Of the last document of `subset`, only the first `last_tokens` tokens count (None: all; see `first_bytes`).
    Every rank plans all rows, and reads the text of its `share` alone. With `groups`, batches say the group of every
    target.
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
        first_block_tokens: int | None = None,
        workers: int = 0,
        total_batches: int | None = None,
        mixture: Mixture | None = None,
        groups: Groups | None = None,
    ):
        if (shape.patches is None) != (patch_starts is None):
            raise ConfigError("a batch shape with patches needs patch boundaries, and one without takes none")
        self.documents, self.shape, self.patch_starts = documents, shape, patch_starts
        self.seed, self.shuffle, self.block_tokens = seed, shuffle, block_tokens
        self.first_block_tokens = first_block_tokens or FIRST_BLOCK_TOKENS
        self.last_tokens, self.total_batches = last_tokens, total_batches
        self.mixture, self.groups = mixture, groups
        self.share = Share()
        self.subset = np.arange(len(documents)) if subset is None else np.asarray(subset, np.int64)
        if not len(self.subset):
            raise InputError("no documents to train on; look at the split with `blt data info`")
        self._epoch_blocks: tuple[int, list[Int]] = (-1, [])
        self._prefetcher: Prefetcher[Block, Batch] = Prefetcher(
            self.plan, self._assemble, self.n_blocks, workers, self._is_wanted
        )
        self.restore({"epoch": 0, "block": 0, "batch": 0})

    def shared(self, share: Share) -> Loader:
        """This loader, which from its next batch on holds the rows of a `share`."""
        self.share = share
        self.restore(self.state())
        return self

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
        if self.mixture is not None:
            order = self.mixture.order(self.seed, epoch)
        elif self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        ends = np.cumsum(self.documents.lengths[order] + 2)
        first = self.block_tokens if epoch else self.first_block_tokens
        cuts = np.searchsorted(ends, _block_ends(int(ends[-1]), self.block_tokens, first))
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
        boundaries = self._boundaries(members, stopped)
        offsets = self._offsets(members)
        cap, patches = self.shape.buckets[-1], self.shape.patches
        if self.shape.pack == "documents":
            order, rows = pack_documents(offsets, boundaries, patches, cap)
            boundaries, members = reordered(boundaries, offsets, order), members[order]
            offsets = self._offsets(members)
        else:
            rows = cut_rows(int(offsets[-1]), boundaries, patches=patches, cap=cap, buckets=self.shape.buckets)
        counted = self._counted(members)
        targets = _between(rows, offsets, counted)
        all_count = counted[1] == np.diff(offsets)
        one_byte = self.documents.token_bytes is None
        return Block(
            epoch,
            block,
            members=members,
            offsets=offsets,
            counted=counted,
            boundaries=boundaries,
            rows=rows,
            targets=targets,
            bytes=_between(rows, offsets, counted - np.array([[0], [1]]) * all_count)
            if one_byte
            else None,  # EOS has none
            documents=np.stack(
                [
                    np.searchsorted(offsets, rows.begin, side="right") - 1,
                    np.searchsorted(offsets, rows.end - 1, side="right"),
                ]
            ),
            patches=np.stack(patch_ranges(rows, boundaries)),
            batches=self._group_rows(rows, self._row_order(targets, (self.seed, epoch, block))),
        )

    def _boundaries(self, members: Int, stopped: Callable[[], bool]) -> Int:
        """Where patches begin in the tokens of these documents; empty without patches."""
        if self.patch_starts is None:
            return np.empty(0, np.int64)
        self.patch_starts.compute(members, stopped)
        return self.patch_starts.boundaries(members)

    def _offsets(self, members: Int) -> Int:
        return np.concatenate([[0], np.cumsum(self.documents.lengths[members] + 2)])

    def _counted(self, members: Int) -> Int:
        """[2, D]: the loss counts the tokens of a document from the first on, before the last: all but BOS, its prompt,
        and what follows `last_tokens`."""
        first = 1 + self.documents.prompt_lengths[members]
        last = self.documents.lengths[members] + 2
        if self.last_tokens is not None:
            limited = np.minimum(last, first + self.last_tokens)
            last = np.where(members == self.subset[-1], limited, last)
        return np.stack([first, last])

    def _row_order(self, targets: Int, seed: tuple[int, int, int]) -> Int:
        """The rows that hold a target, in the order in which they fill batches."""
        order = np.flatnonzero(targets > 0)
        return np.random.default_rng(seed).permutation(order) if self.shuffle else order

    def _group_rows(self, rows: Rows, order: Int) -> list[Int]:
        """The rows of every batch, longest first; the last batch may have fewer."""
        parts = [order[first : first + self.shape.rows] for first in range(0, len(order), self.shape.rows)]
        return [part[np.argsort(-rows.lengths[part], kind="stable")] for part in parts]

    def _assemble(self, block: Block, index: int) -> Batch:
        rows, share = block.batches[index], self.share
        B, P, buckets = self.shape.rows, self.shape.patches, self.shape.buckets
        N = buckets[int(np.searchsorted(buckets, block.rows.lengths[rows[0]]))]
        mine = share.rows(B)
        held = rows[mine[mine < len(rows)]]  # a batch ends with its blank rows
        if block.bytes is None:  # they follow from the tokens of all rows
            ids, targets, mask = self._read(block, rows, B, N)
            row_bytes = self._bytes(targets, mask)
            ids, targets, mask = ids[mine], targets[mine], mask[mine]
        else:
            ids, targets, mask = self._read(block, held, len(mine), N)
            row_bytes = _padded(block.bytes[rows], B)
        document_pairs = zip(*block.documents[:, rows].tolist(), strict=True)
        blank = [np.empty(0, np.int64)] * (B - len(rows))
        return Batch(
            ids, targets, mask,
            patch_lengths=None if P is None else self._patch_lengths(block, held, len(mine), N),
            starts=_padded(block.rows.begin[rows], B, -1), block=block.number, epoch=block.epoch, index=index,
            row_tokens=_padded(block.rows.lengths[rows], B), row_targets=_padded(block.targets[rows], B),
            row_bytes=row_bytes, row_patches=None if P is None else _padded(block.n_patches[rows], B),
            documents=(*(block.members[first:last] for first, last in document_pairs), *blank),
            buckets=buckets, micro_rows=share.micro_rows, share=share,
            target_groups=self._target_groups(block, held, len(mine), N),
        )  # fmt: skip

    def _read(self, block: Block, rows: Int, n_rows: int, n_tokens: int) -> tuple[Ids, Ids, Bools]:
        """Inputs, targets and mask [n_rows, n_tokens] of these rows, and of blank rows after them."""
        pieces, lengths = _pieces(block, rows), block.rows.lengths[rows]
        text = self.documents.read(block.members[pieces.document], pieces.begin, pieces.end)
        ids_HN, targets_HN = np.zeros((2, n_rows, n_tokens), text.dtype)
        mask_HN = np.zeros((n_rows, n_tokens), np.bool_)
        starts = np.cumsum(lengths + 1) - lengths - 1
        for row, (at, n) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            ids_HN[row, :n], targets_HN[row, :n] = text[at : at + n], text[at + 1 : at + n + 1]
            mask_HN[row, :n] = True
        _clear_uncounted(mask_HN, pieces, block.counted[:, pieces.document])
        return ids_HN, targets_HN, mask_HN

    def _target_groups(self, block: Block, rows: Int, n_rows: int, n_tokens: int) -> Int | None:
        """[n_rows, n_tokens] of these rows, and of blank rows after them; None if no groups are wanted."""
        if self.groups is None:
            return None
        groups_HN = np.zeros((n_rows, n_tokens), np.int64)
        pieces = _pieces(block, rows)
        first, size = pieces.place - 1, pieces.end - pieces.begin  # a token is the target of the place before it
        groups = self.groups.of_document[block.members[pieces.document]]
        columns = (pieces.row, np.maximum(first, 0), first + size, groups)
        for row, begin, end, group in zip(*(column.tolist() for column in columns), strict=True):
            groups_HN[row, begin:end] = group
        return groups_HN

    def _patch_lengths(self, block: Block, rows: Int, n_rows: int, n_bytes: int) -> NDArray[np.int32]:
        """[n_rows, P] of these rows, and of blank rows after them."""
        begin, first, last = (
            _padded(x, n_rows) for x in (block.rows.begin[rows], block.patches[0, rows], block.patches[1, rows])
        )
        P = self.shape.patches or 0
        return patch_lengths_of(begin, first, last, boundaries=block.boundaries, patches=P, n_bytes=n_bytes)

    def _bytes(self, targets_BN: Ids, mask_BN: Bools) -> Int:
        """The bytes of the counted targets of each row."""
        table = self.documents.token_bytes
        assert table is not None
        return np.asarray((table[targets_BN] * mask_BN).sum(1))


def _pieces(block: Block, rows: Int) -> _Pieces:
    """Each row has a piece of every document that it covers."""
    first, last = block.documents[:, rows]
    counts = last - first
    row = np.repeat(np.arange(len(rows)), counts)
    document = np.arange(len(row)) + np.repeat(first - np.cumsum(counts) + counts, counts)
    offset, row_begin = block.offsets[document], block.rows.begin[rows][row]
    begin = np.maximum(row_begin - offset, 0)
    end = np.minimum(block.rows.end[rows][row], block.offsets[document + 1]) - offset
    return _Pieces(row, document, begin=begin, end=end, place=offset + begin - row_begin)


def _clear_uncounted(mask_HN: Bools, pieces: _Pieces, counted: Int) -> None:
    """Clears the targets before the first and from the last of the `counted` tokens [2, pieces] of their documents."""
    size = pieces.end - pieces.begin
    row = pieces.row * mask_HN.shape[1]
    target = row + pieces.place - 1  # that is the piece's first token; -1 for the first token of a row
    before, after = np.clip(counted[0] - pieces.begin, 0, size), np.clip(pieces.end - counted[1], 0, size)
    for begin, end in ((target, target + before), (target + size - after, target + size)):
        _clear(mask_HN.reshape(-1), np.maximum(begin, row), end)


def _clear(mask: Bools, begin: Int, end: Int) -> None:
    """Clears the places [begin, end)."""
    size = end - begin
    mask[begin[size == 1]] = False
    for first, last in zip(begin[size > 1].tolist(), end[size > 1].tolist(), strict=True):
        mask[first:last] = False


def _between(rows: Rows, offsets: Int, counted: Int) -> Int:
    """How many of the `counted` tokens [2, D] (first, last + 1 in each document) are targets of each row, [R]."""
    first, last = counted
    sizes = np.maximum(last - first, 0)
    before = np.cumsum(sizes) - sizes

    def up_to(positions: Int) -> Int:
        """Counted tokens at smaller positions."""
        document = np.minimum(np.searchsorted(offsets, positions, side="right") - 1, len(sizes) - 1)
        inside = positions - offsets[document] - first[document]
        return np.asarray(before[document] + np.clip(inside, 0, sizes[document]))

    return up_to(rows.end) - up_to(rows.begin + 1)


def _padded(values: Int, length: int, blank: int = 0) -> Int:
    if len(values) == length:
        return values
    return np.concatenate([values, np.full(length - len(values), blank, np.int64)])


def _block_ends(tokens: int, block_tokens: int, first: int) -> Int:
    """Where the blocks of an epoch end, in tokens from its start; the last block ends with the epoch. Up to
    `block_tokens`, blocks grow from `first` tokens."""
    growing = [first << i for i in range(block_tokens.bit_length()) if first << i < block_tokens]
    return np.array([*growing, *range(block_tokens, tokens, block_tokens)], np.int64)
