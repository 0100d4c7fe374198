"""Chooses the few row lengths (buckets) of a data set that leave little padding in its batches.

Every length costs one compilation. A row is padded up to the next bucket, or stops at the one below, a few patches
short. The lengths with the least waste on the rows of a sample are found by dynamic programming over multiples of a
step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from blt.data.batches import BatchShape, Int, PatchStarts, TokenSource
from blt.data.mixture import Mixture
from blt.data.packing import Loader

STEP = 32
"""Lengths are multiples of it, to fit the tiles of matrix products; rows shorter than 16 steps use a smaller step."""
CANDIDATES = 512
"""The largest number of lengths to choose from (longer rows use a multiple of STEP): the waste between any two takes
some matrices of CANDIDATES^2 numbers."""
WORTH = 0.001
"""The share of the tokens that one more length must save. The saving falls with every length added."""
Floats = NDArray[np.float64]


def choose_buckets(lengths: Int, count: int, longest: int, early: bool = True) -> tuple[int, ...]:
    """At most `count` ascending lengths that waste the least on rows of these `lengths`; the last one is `longest`.

    A row is padded up to the next length. If the length below is nearer and rows may end `early`, it stops there
    (`blt.data.rows.cut_rows`) and wastes patches worth as many bytes; rows of whole documents may not. `longest` is
    included even if no row of the sample is that long, because a row of another block may be.
    """
    step = min(STEP, max(1, longest // 16))
    step *= max(1, -(-longest // (CANDIDATES * step)))
    ends = np.unique(np.append(np.arange(step, longest, step).clip(2), longest))
    first, between = _waste(np.sort(lengths), ends, early)
    waste, choices = first, []
    for _ in range(count - 1):
        # waste[j]: the least for the rows up to ends[j]; the previous length may be any ends[i], i < j.
        options = waste + between
        if waste[-1] - options[-1].min() < WORTH * lengths.sum():
            break
        choices.append(np.where(options.min(1) < waste, options.argmin(1), -1))
        waste = np.minimum(waste, options.min(1))
    found, end = [longest], len(ends) - 1
    for choice in reversed(choices):
        if choice[end] >= 0:
            end = int(choice[end])
            found.append(int(ends[end]))
    return tuple(reversed(found))


def _waste(lengths: Int, ends: Int, early: bool) -> tuple[Floats, Floats]:
    """Tokens wasted on rows of ascending `lengths`: on all rows up to each of `ends`, [E], if it is the first bucket,
    and on the rows between two neighbouring buckets, [E, E] (upper, lower; infinite unless lower < upper)."""
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
    mixture: Mixture | None = None,
) -> BatchShape:
    """The shape with at most `count` buckets, chosen on the first block of the documents; the longest one is kept.

    The result depends only on the arguments, so a resumed run chooses the same.
    """
    sample = Loader(documents, shape, starts, seed=seed, subset=subset, mixture=mixture).plan(0, 0)
    early = shape.pack == "stream"
    return replace(shape, buckets=choose_buckets(sample.rows.lengths, count, longest=shape.buckets[-1], early=early))
