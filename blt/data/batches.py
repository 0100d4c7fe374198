"""The input of a step: documents as a source of tokens, the static shapes of batches, one batch.

Letters: B rows, N tokens of a row (bytes, for a byte-level model), P patches, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from blt_runtime.errors import ConfigError
from blt_runtime.ids import OFFSET

Int = NDArray[np.int64]
Ids = NDArray[np.integer[Any]]
Pack = Literal["stream", "documents"]
NAMED_DOCUMENTS = 4
_BY_POSITION = ("ids", "targets", "mask", "target_groups")
_HELD = (*_BY_POSITION, "patch_lengths")
_ALL = ("starts", "row_tokens", "row_targets", "row_bytes", "row_patches", "documents")


def never() -> bool:
    """False: nothing stops the work."""
    return False


class TokenSource(Protocol):
    """Documents as tokens.

    `lengths` are tokens per document without BOS and EOS. `prompt_lengths` are the tokens after BOS that carry no loss.
    `token_bytes` [V] is the number of bytes of each id; None: ids from 4 on are one byte each, special ids none.
    """

    @property
    def lengths(self) -> Int: ...

    @property
    def prompt_lengths(self) -> Int: ...

    @property
    def token_bytes(self) -> Int | None: ...

    def __len__(self) -> int: ...

    def ids(self, index: int, /) -> Ids:
        """BOS, tokens, EOS: int16 or int32 [length + 2]."""
        ...

    def read(self, documents: Int, begin: Int, end: Int, /) -> Ids:
        """`ids(document)[begin:end]` of each of these documents, one after another: int16 or int32."""
        ...


class PatchStarts(Protocol):
    """Patch boundaries per document."""

    def starts(self, document: int) -> NDArray[np.bool_]:
        """bool [length + 2], positions 0 and 1 True."""
        ...

    def boundaries(self, members: Int) -> Int:
        """Where patches begin in the tokens (BOS ... EOS) of these documents, one after another: ascending."""
        ...

    def compute(self, members: Int, stopped: Callable[[], bool] = never) -> None:
        """Computes what the boundaries of these documents need, all at once.

        Raises CancelledError (of concurrent.futures) soon after `stopped()` is true; what was computed is kept.
        """
        ...

    def computed(self, members: Int) -> bool:
        """Whether `compute` has nothing to do for these documents."""
        ...


class Groups(NamedTuple):
    """The group of each document of a source, as an index of `names`."""

    names: tuple[str, ...]
    of_document: Int


def first_bytes(documents: TokenSource, members: Int, n_bytes: int) -> tuple[Int, int | None]:
    """The first `n_bytes` bytes of these documents in their order, prompts not counted: the documents that hold them,
    and the number of tokens that count in the last one (None: all of it, EOS included).

    A token that crosses the limit counts.
    """
    left, table = n_bytes, documents.token_bytes
    for i, document in enumerate(members.tolist()):
        ids = documents.ids(document)[1 + int(documents.prompt_lengths[document]) : -1]
        ends = np.arange(1, len(ids) + 1) if table is None else np.cumsum(table[ids])
        if len(ids) and ends[-1] >= left:
            tokens = int(np.searchsorted(ends, left)) + 1
            return members[: i + 1], None if tokens == len(ids) else tokens
        left -= int(ends[-1]) if len(ids) else 0
    return members, None


@dataclass(frozen=True)
class BatchShape:
    """`rows` rows of `patches` patches (None: no patches), in one of the ascending lengths `buckets`.

    `pack`: "stream" cuts rows out of all documents one after another; "documents" packs whole documents into rows, and
    cuts only those that are longer than a row. Raises ConfigError.
    """

    rows: int
    buckets: tuple[int, ...]
    patches: int | None = None
    pack: Pack = "stream"

    def __post_init__(self) -> None:
        if self.rows < 1 or not self.buckets or list(self.buckets) != sorted(set(self.buckets)) or self.buckets[0] < 2:
            raise ConfigError("batch.rows must be at least 1 and batch.byte_buckets ascending lengths of at least 2")
        if self.patches is not None and self.patches < 2:
            raise ConfigError("batch.patches must be at least 2: the first patch of a row is one token")


@dataclass(frozen=True)
class Share:
    """Which of a batch's micro-batches of `micro_rows` rows (None: all rows) one of `world` ranks computes: those with
    the numbers rank, rank + world, ... At any time ranks compute rows of neighbouring lengths and wait little.
    """

    rank: int = 0
    world: int = 1
    micro_rows: int | None = None

    def rows(self, n_rows: int) -> Int:
        """The rank's rows of a batch, ascending."""
        every = np.arange(n_rows).reshape(-1, self.micro_rows or n_rows)
        return every[self.rank :: self.world].ravel()


@dataclass(frozen=True)
class Batch:
    """The input of one GLOBAL step, or some rows of it.

    ids, targets: integers of the source's 16 or 32 bits [H, N], padding 0.  mask: bool [H, N], the targets that the
    loss counts.  patch_lengths: integers [H, P] with sum N + 1 per row, or None.  target_groups: int64 [H, N], the
    group of each target's document, or None. These five hold the rows of a `share`: of a single rank all, H = B.

    Of all rows: starts: [B] the row's offset in its block, -1 for a blank row.  row_tokens: [B] positions that are not
    padding (None: the unmasked ones).  row_targets: [B] counted targets (None: the unmasked ones).  row_bytes: [B]
    bytes of the counted targets (None: the unmasked bytes).  row_patches: [B] patches that hold a token (None: those of
    `patch_lengths`).  documents: those of each row.

    index: the batch's number in its block.  buckets: the ascending lengths that rows are padded to, of which N is one
    (empty: N alone).  micro_rows: rows that are computed at a time (None: all).
    """

    ids: Ids
    targets: Ids
    mask: NDArray[np.bool_]
    patch_lengths: Ids | None
    starts: Int
    block: int
    epoch: int = 0
    index: int = 0
    row_tokens: Int | None = None
    row_targets: Int | None = None
    row_bytes: Int | None = None
    row_patches: Int | None = None
    documents: tuple[Int, ...] = ()
    buckets: tuple[int, ...] = ()
    micro_rows: int | None = None
    share: Share = Share()
    target_groups: Int | None = None

    def micro_batches(self) -> list[Batch]:
        """The share's parts of `micro_rows` rows, each padded only to the bucket of its longest row.

        Rows of a batch are ordered by length, so few parts mix buckets.
        """
        step, lengths = self.micro_rows or len(self.starts), self.micro_lengths
        return [
            self._part(held * step, number * step, step).padded_to(lengths[number])
            for held, number in enumerate(range(self.share.rank, len(lengths), self.share.world))
        ]

    @property
    def micro_lengths(self) -> list[int]:
        """The padded length of each micro-batch."""
        step, N = self.micro_rows or len(self.starts), self.mask.shape[1]
        if self.row_tokens is None:
            return [N] * (len(self.starts) // step)
        longest = self.row_tokens.reshape(-1, step).max(1)
        return [next((length for length in self.buckets if length >= n), N) for n in longest.tolist()]

    @property
    def places(self) -> int:
        """Byte positions that are computed, padding included."""
        return (self.micro_rows or len(self.starts)) * sum(self.micro_lengths)

    def padded_to(self, length: int) -> Batch:
        """The batch with rows of `length` positions, at least as many as its longest row has."""
        held = {name: getattr(self, name) for name in _BY_POSITION}
        cut = {name: array[:, :length] for name, array in held.items() if array is not None}
        if self.patch_lengths is not None:
            patch_lengths_BP = self.patch_lengths.copy()
            last_B = np.count_nonzero(patch_lengths_BP, axis=1) - 1  # it holds the padding
            patch_lengths_BP[np.arange(len(last_B)), last_B] -= self.mask.shape[1] - length
            cut["patch_lengths"] = patch_lengths_BP
        return replace(self, **cut)

    def rows(self, first: int, stop: int) -> Batch:
        """The rows [first, stop) as a batch that is computed at once, of a batch that has all rows."""
        return self._part(first, first, stop - first)

    def _part(self, held: int, row: int, count: int) -> Batch:
        """`count` rows as a batch of its own: from row `held` of the arrays, which is `row` in the batch."""
        parts: dict[str, Any] = {}
        for names, rows in ((_HELD, slice(held, held + count)), (_ALL, slice(row, row + count))):
            for name in names:
                value = getattr(self, name)
                parts[name] = None if value is None else value[rows]
        return replace(self, **parts, micro_rows=None, share=Share())

    @property
    def n_targets(self) -> int:
        """Targets that the loss counts."""
        return int(self.mask.sum() if self.row_targets is None else self.row_targets.sum())

    @property
    def n_bytes(self) -> int:
        """Bytes of the counted targets: the denominator of bits per byte."""
        if self.row_bytes is None:
            return int((self.mask & (self.targets >= OFFSET)).sum())
        return int(self.row_bytes.sum())

    @property
    def n_tokens(self) -> int:
        """Positions that are not padding."""
        return self.n_targets if self.row_tokens is None else int(self.row_tokens.sum())

    @property
    def n_patches(self) -> int:
        """Patches that hold at least one token, the one-token first patch of each row included."""
        if self.row_patches is not None:
            return int(self.row_patches.sum())
        return 0 if self.patch_lengths is None else int((self.patch_lengths[self.starts >= 0] > 0).sum())

    @property
    def patch_places(self) -> int:
        """B x P: what the latent transformer computes, padding included."""
        return 0 if self.patch_lengths is None else len(self.starts) * self.patch_lengths.shape[1]

    @property
    def identity(self) -> str:
        """The batch's origin for messages: `epoch 0, block 3, batch 17 (documents 4, 21 and 9 others)`."""
        position = f"epoch {self.epoch}, block {self.block}, batch {self.index}"
        if not self.documents:
            return position
        found = [int(document) for document in np.unique(np.concatenate(self.documents))]
        names = ", ".join(str(document) for document in found[:NAMED_DOCUMENTS])
        more = f" and {len(found) - NAMED_DOCUMENTS} others" if len(found) > NAMED_DOCUMENTS else ""
        return f"{position} (documents {names}{more})"
