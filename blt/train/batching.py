"""The batches of a configuration: their shape, row lengths chosen on the data, and a report on padding."""

from __future__ import annotations

import logging
from typing import Any, TypeVar, cast

import numpy as np

from blt.data.batches import BatchShape, Int, PatchStarts, TokenSource
from blt.data.buckets import fit_buckets
from blt.data.mixture import Mixture
from blt.data.packing import Block, Loader
from blt.train.config import BLTRun, BPERun, EntropyRun, RunConfig

log = logging.getLogger("blt.train")
Config = TypeVar("Config", bound=BLTRun | BPERun | EntropyRun)


def batch_shape(config: RunConfig) -> BatchShape:
    """The static shapes of a run's batches."""
    batch = config.batch
    return BatchShape(batch.rows, batch.byte_buckets, patches=batch.patches, pack=batch.pack)


def with_buckets(
    config: Config,
    documents: TokenSource,
    members: Int,
    starts: PatchStarts | None = None,
    mixture: Mixture | None = None,
) -> Config:
    """The configuration with at most `batch.auto_buckets` row lengths, chosen on these training documents."""
    batch = config.batch
    if batch.auto_buckets is None or not len(members):
        return config
    shape = fit_buckets(
        batch_shape(config),
        batch.auto_buckets,
        documents=documents,
        starts=starts,
        seed=config.run.seed,
        subset=members,
        mixture=mixture,
    )
    log.info("row lengths %s", ", ".join(str(length) for length in shape.buckets))
    chosen = batch.model_copy(update={"byte_buckets": shape.buckets, "auto_buckets": None})
    return cast(Config, config.model_copy(update={"batch": chosen}))


def packing_report(loader: Loader, micro_rows: int | None = None, blocks: int | None = None) -> dict[str, Any]:
    """Statistics of the batches of the first epoch (`blocks`: only of its first blocks); no batch is made.

    padding: share of the byte positions.  patch_padding: share of the patch positions.  patch_size: tokens per patch;
    the one-token first patch of each row counts.  buckets: micro-batches of `micro_rows` rows (None: batches) of each
    length.  All as in the log lines of a run.
    """
    count = loader.n_blocks(0) if blocks is None else min(blocks, loader.n_blocks(0))
    micro_rows = micro_rows or loader.shape.rows
    found = [_BlockCounts(loader.plan(0, number), loader.shape, micro_rows) for number in range(count)]
    tokens, positions, patches, patch_positions, rows = (
        sum(getattr(counts, name) for counts in found)
        for name in ("tokens", "positions", "patches", "patch_positions", "rows")
    )
    buckets = {str(length): sum(counts.buckets.get(length, 0) for counts in found) for length in loader.shape.buckets}
    report: dict[str, Any] = {
        "blocks": count,
        "documents": sum(counts.documents for counts in found),
        "tokens": tokens,
        "rows": rows,
        "batches": sum(counts.batches for counts in found),
        "buckets": buckets,
        "padding": 1 - tokens / max(1, positions),
    }
    if patches:
        report |= {"patch_size": tokens / patches, "patch_padding": 1 - patches / patch_positions}
    return report


class _BlockCounts:
    """The counts of one block's batches."""

    def __init__(self, block: Block, shape: BatchShape, micro_rows: int):
        used = np.concatenate([np.empty(0, np.int64), *block.batches])
        lengths_XB = np.zeros((len(block.batches), shape.rows), np.int64)  # of the rows of all batches, longest first
        for row_B, rows in zip(lengths_XB, block.batches, strict=True):
            row_B[: len(rows)] = block.rows.lengths[rows]
        lengths = np.array(shape.buckets)[np.searchsorted(shape.buckets, lengths_XB[:, ::micro_rows].ravel())]
        self.documents, self.rows, self.batches = len(block.members), len(used), len(block.batches)
        self.tokens = int(block.rows.lengths[used].sum())
        self.positions = micro_rows * int(lengths.sum())
        self.patch_positions = lengths_XB.size * (shape.patches or 0)
        self.patches = int(block.n_patches[used].sum()) if shape.patches else 0
        self.buckets = dict(zip(*(column.tolist() for column in np.unique(lengths, return_counts=True)), strict=True))
