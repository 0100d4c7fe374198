"""Which few row lengths a data set needs, so that little of a batch is padding.

Every length costs one compilation; a row is padded up to the next one, or ends at the one before and lacks patches. The
lengths with the least waste over the rows of a sample are found by dynamic programming over the multiples of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from blt.data.batches import BatchShape, Int, PatchStarts, TokenSource
from blt.data.packing import Loader

SAMPLE_TOKENS = 16 << 20
STEP = 32
"""Lengths are multiples of it, for the tiles of matrix products; of less where rows are shorter than 16 of them."""
CANDIDATES = 512
"""Lengths to choose from, at most (a larger multiple of STEP then): the waste between any two is some matrices of
CANDIDATES^2 numbers."""


WORTH = 0.001
"""Share of the tokens that a further length must save. (What the next one saves falls with their number.)"""
Floats = NDArray[np.float64]


def choose_buckets(lengths: Int, count: int, longest: int, early: bool = True) -> tuple[int, ...]:
    """At most `count` ascending lengths that waste the least on rows of these natural `lengths`; the last is `longest`.

    A row is padded up to the next length or, if that is nearer and rows may end `early` (whole documents may not), ends
    at the one before (`blt.data.rows.cut_rows`) and wastes as many bytes' worth of patches. `longest` is there even if
    no row of the sample is that long, because another block's may be.
    """
    step = min(STEP, max(1, longest // 16))
    step *= max(1, -(-longest // (CANDIDATES * step)))
    ends = np.unique(np.append(np.arange(step, longest, step).clip(2), longest))
    first, between = _waste(np.sort(lengths), ends, early)
    waste, came_from = first, []
    for _ in range(count - 1):
        # waste[j]: the least for the rows up to ends[j]; one more length may begin behind any ends[i], i < j.
        options = waste + between
        if waste[-1] - options[-1].min() < WORTH * lengths.sum():
            break
        came_from.append(np.where(options.min(1) < waste, options.argmin(1), -1))
        waste = np.minimum(waste, options.min(1))
    found, end = [longest], len(ends) - 1
    for choice in reversed(came_from):
        if choice[end] >= 0:
            end = int(choice[end])
            found.append(int(ends[end]))
    return tuple(reversed(found))


def _waste(lengths: Int, ends: Int, early: bool) -> tuple[Floats, Floats]:
    """Tokens wasted on the rows (ascending `lengths`) up to each of `ends` [E] if it is the first bucket, and on those
    between two buckets that follow each other, [E, E] (upper, lower; infinite unless lower < upper)."""
    sums = np.concatenate([[0], np.cumsum(lengths)])

    def up_to(ends: Int) -> tuple[Int, Int]:
        n = np.searchsorted(lengths, ends, side="right")
        return n, sums[n]

    n, s = up_to(ends)
    upper, lower = ends[:, None], ends[None]
    half_n, half_s = up_to((upper + lower - 1) // 2 if early else lower)  # rows up to here end at the lower one
    down = half_s - s[None] - lower * (half_n - n[None])
    up = upper * (n[:, None] - half_n) - (s[:, None] - half_s)
    return (ends * n - s).astype(float), np.where(lower < upper, down + up, np.inf)


def fit_buckets(
    shape: BatchShape,
    count: int,
    documents: TokenSource,
    starts: PatchStarts | None = None,
    *,
    seed: int = 0,
    subset: Sequence[int] | Int | None = None,
) -> BatchShape:
    """The shape with at most `count` buckets, chosen on SAMPLE_TOKENS of the documents and the last one kept.

    A function of its arguments: a resumed run finds the same.
    """
    sample = Loader(documents, shape, starts, seed=seed, subset=subset, block_tokens=SAMPLE_TOKENS).plan(0, 0)
    early = shape.pack == "stream"
    return replace(shape, buckets=choose_buckets(sample.rows.lengths, count, shape.buckets[-1], early))
