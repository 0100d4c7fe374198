"""Which few row lengths a data set needs, so that little of a batch is padding.

Every length costs one compilation and every row is padded up to the next one. The lengths with the least padding over
the rows of a sample are found by dynamic programming over the multiples of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from blt.data.batches import BatchShape, Int, PatchStarts, TokenSource
from blt.data.packing import Loader

SAMPLE_TOKENS = 16 << 20
STEP = 32
"""Lengths are multiples of it, for the tiles of matrix products; of less where rows are shorter than 16 of them."""


WORTH = 0.001
"""Share of the places that a further length must save. (What the next one saves falls with their number.)"""


def choose_buckets(lengths: Int, count: int, longest: int) -> tuple[int, ...]:
    """At most `count` ascending lengths that pad rows of these `lengths` the least; the last is `longest`.

    It is one of them even if no row of the sample is that long, because another block's may be.
    """
    step = min(STEP, max(1, longest // 16))
    ends = np.unique(np.append((-(-lengths // step) * step).clip(2, longest), longest))
    below = np.concatenate([[0], np.searchsorted(np.sort(lengths), ends, side="right")])
    places, came_from = ends * below[1:], []
    for _ in range(count - 1):
        # places[j]: the fewest places for the rows up to ends[j]; one more bucket may begin behind any ends[i], i < j.
        options = np.where(np.tri(len(ends), k=-1) > 0, places + ends[:, None] * (below[1:, None] - below[1:]), np.inf)
        if places[-1] - options[-1].min() < WORTH * places[-1]:
            break
        came_from.append(np.where(options.min(1) < places, options.argmin(1), -1))
        places = np.minimum(places, options.min(1))
    found, end = [longest], len(ends) - 1
    for choice in reversed(came_from):
        if choice[end] >= 0:
            end = int(choice[end])
            found.append(int(ends[end]))
    return tuple(reversed(found))


def fitted(
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
    return replace(shape, buckets=choose_buckets(sample.rows.lengths, count, shape.buckets[-1]))
