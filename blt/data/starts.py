"""Where patches begin in many documents at a time: the rules of `blt_runtime.patching`, for planning whole blocks.

The definition is `patch_lengths` of one document; tests compare. Its functions take a call of numpy or more for each
document, these for each CHUNK of tokens. No torch here.

Letters: D documents, T tokens of all of them (BOS, bytes, EOS of each, one after another), P patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from blt.data.batches import Int
from blt.data.dataset import Documents
from blt_runtime.ids import OFFSET
from blt_runtime.patching import SPACELIKE, PatchRule, to_bfloat16

CHUNK = 1 << 18
"""Tokens at a time: what is computed of them stays in a processor's cache."""
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
_SPACES = SPACELIKE[OFFSET:].tobytes()
"""For `bytes.translate`: 1 for a byte like a space, else 0. It takes a fifth of the time of indexing an array."""


def block_boundaries(
    rule: PatchRule, documents: Documents, members: Int, entropies: Callable[[Int], Floats] | None = None
) -> Int:
    """The ascending positions [P] where patches begin in the tokens of the documents `members`, one after another.

    entropies: of the tokens [T] of some documents, in nats; for rules that need them.
    """
    found = [np.empty(0, np.int64)]
    for offset, part in chunks(documents.lengths[members] + 2):
        lengths = documents.lengths[members[part]] + 2
        if rule.scheme == "static":
            assert rule.patch_size is not None
            positions = _static(lengths, rule.patch_size)
        else:
            positions = np.flatnonzero(_starts(rule, documents, members[part], entropies))
        if rule.max_patch_length is not None:
            positions = split_long(positions, int(lengths.sum()), rule.max_patch_length)
        found.append(positions + offset)
    return np.concatenate(found)


def chunks(lengths: Int) -> Iterator[tuple[int, slice]]:
    """Neighbouring documents with about CHUNK tokens: the offset of their first token, and their places in `lengths`
    (tokens of each document)."""
    offsets = np.cumsum(lengths) - lengths
    edges = [0, *(np.flatnonzero(np.diff(offsets // CHUNK)) + 1).tolist(), len(lengths)]
    for first, last in pairwise(edges):
        if first < last:
            yield int(offsets[first]), slice(first, last)


def _starts(rule: PatchRule, documents: Documents, members: Int, entropies: Callable[[Int], Floats] | None) -> Bools:
    """True where a patch begins, [T], before `max_patch_length`."""
    lengths = documents.lengths[members] + 2
    offsets, total = np.cumsum(lengths) - lengths, int(lengths.sum())
    starts_T = np.ones(total, np.bool_)
    if rule.scheme == "space":
        spaces_T = np.frombuffer(documents.texts(members).tobytes().translate(_SPACES), np.bool_)
        np.greater(spaces_T[1:-1], spaces_T[:-2], out=starts_T[2:])  # the byte before is the first of some spaces
    elif rule.scheme == "entropy":
        assert entropies is not None
        starts_T[1:] = _closes(rule, entropies(members), offsets, lengths)[:-1]
    else:
        assert rule.scheme == "byte", rule.scheme  # no run trains on patches of bpe tokens
    starts_T[offsets] = starts_T[offsets + 1] = True
    return starts_T


def _closes(rule: PatchRule, entropies_T: Floats, offsets: Int, lengths: Int) -> Bools:
    """True where the entropies end a patch, [T]; at the first token of a document the value has no meaning."""
    assert rule.threshold is not None
    rounded = to_bfloat16 if rule.entropy_dtype == "bfloat16" else np.float32
    entropies_T = np.asarray(rounded(entropies_T))
    closes_T: Bools = entropies_T > rounded(rule.threshold)
    if not rule.monotonic and rule.threshold_add is None:
        return closes_T
    rises_T = np.asarray(rounded(np.diff(entropies_T, prepend=entropies_T[:1])))
    if rule.monotonic:
        closes_T = rises_T > rounded(rule.threshold)
    else:
        assert rule.threshold_add is not None
        closes_T &= rises_T > rounded(rule.threshold_add)
        closes_T[offsets[lengths > 2] + 2] = False  # as in `patch_lengths`
    closes_T[offsets + 1] = True
    return closes_T


def _static(lengths: Int, patch_size: int) -> Int:
    """The positions [P] for documents of these lengths: 0, 1, 1 + patch_size, ... in each."""
    counts = 2 + (lengths - 2) // patch_size
    first = np.cumsum(counts) - counts
    offsets = np.cumsum(lengths) - lengths
    positions = np.arange(int(counts.sum())) * patch_size
    positions += np.repeat(offsets + 1 - patch_size * (first + 1), counts)
    positions[first] = offsets
    return positions


def split_long(positions: Int, total: int, longest: int) -> Int:
    """The positions with further ones wherever a patch of the `total` tokens is longer than `longest`."""
    lengths = np.diff(positions, append=total)
    long = np.flatnonzero(lengths > longest)
    if not len(long):
        return positions
    more = (lengths[long] - 1) // longest
    rank = np.arange(1, int(more.sum()) + 1) - np.repeat(np.cumsum(more) - more, more)
    return np.insert(positions, np.repeat(long + 1, more), np.repeat(positions[long], more) + rank * longest)
