"""How well documents fit into the batches of a configuration: row lengths chosen on the data, and a report."""

from __future__ import annotations

import logging
from typing import Any, TypeVar, cast

import numpy as np

from blt.data.batches import BatchShape, Int, PatchStarts, TokenSource
from blt.data.buckets import fitted
from blt.data.packing import Block, Loader
from blt.data.rows import row_patches
from blt.train.config import BLTRun, BPERun, EntropyRun, RunConfig

log = logging.getLogger("blt.train")
Config = TypeVar("Config", bound=BLTRun | BPERun | EntropyRun)


def batch_shape(config: RunConfig) -> BatchShape:
    """The static shapes of a run's batches."""
    batch = config.batch
    return BatchShape(batch.rows, batch.byte_buckets, batch.patches, batch.pack)


def with_buckets(config: Config, documents: TokenSource, members: Int, starts: PatchStarts | None = None) -> Config:
    """The configuration with the row lengths that `batch.auto_buckets` asks for, chosen on these training documents."""
    batch = config.batch
    if batch.auto_buckets is None or not len(members):
        return config
    shape = fitted(batch_shape(config), batch.auto_buckets, documents, starts, seed=config.run.seed, subset=members)
    log.info("row lengths %s", ", ".join(str(length) for length in shape.buckets))
    chosen = batch.model_copy(update={"byte_buckets": shape.buckets, "auto_buckets": None})
    return cast(Config, config.model_copy(update={"batch": chosen}))


def packing_report(loader: Loader, blocks: int | None = None) -> dict[str, Any]:
    """What the batches of the first epoch look like, without making them (`blocks`: of its first blocks).

    padding: share of the byte places.  patch_padding: share of the patch places.  patch_size: tokens a patch, the
    one-token first patch of each row counted.  buckets: batches of each length.  All as in the log lines of a run.
    """
    count = loader.n_blocks(0) if blocks is None else min(blocks, loader.n_blocks(0))
    parts = [_Sums(loader.plan(0, number), loader.shape) for number in range(count)]
    tokens, places, patches, patch_places, rows = (
        sum(getattr(part, name) for part in parts) for name in ("tokens", "places", "patches", "patch_places", "rows")
    )
    buckets = {str(length): sum(part.buckets.get(length, 0) for part in parts) for length in loader.shape.buckets}
    report: dict[str, Any] = {
        "blocks": count,
        "documents": sum(part.documents for part in parts),
        "tokens": tokens,
        "rows": rows,
        "batches": sum(buckets.values()),
        "buckets": buckets,
        "padding": 1 - tokens / max(1, places),
    }
    if patches:
        report |= {"patch_size": tokens / patches, "patch_padding": 1 - patches / patch_places}
    return report


class _Sums:
    """The counts of one block's batches."""

    def __init__(self, block: Block, shape: BatchShape):
        dealt = np.array([row for _, rows in block.batches for row in rows], np.int64)
        lengths = [length for length, _ in block.batches]
        self.documents, self.rows = len(block.members), len(dealt)
        self.tokens = int(block.rows.lengths[dealt].sum())
        self.places = shape.rows * sum(lengths)
        self.patch_places = shape.rows * len(lengths) * (shape.patches or 0)
        self.patches = int(row_patches(block.rows, block.boundaries)[dealt].sum()) if shape.patches else 0
        self.buckets = dict(zip(*(part.tolist() for part in np.unique(lengths, return_counts=True)), strict=True))
