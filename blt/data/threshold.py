"""Chooses the threshold for a target patch size: entropies in, a patch rule out. No model and no file is used.

The mean patch size is in bytes per patch, as `blt eval` counts them. The patch of BOS is not counted. An EOS that opens
a patch adds a patch and no byte. A last patch that holds only the virtual next token does not count.

The mean is a step function of the threshold: it changes only where the threshold passes one of the keys, the numbers
that the rule compares with it (entropies, or their rises for the monotonic rule). It never decreases: a higher
threshold opens a subset of the patches, and splitting at the longest patch keeps the order (two merged patches never
need more pieces than the two had). So a bisection over the sorted keys finds the closest mean. Every mean on the way is
measured with `patch_lengths`, longest patches and document ends included.

Letters: N tokens of a piece, P patches.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blt_runtime.errors import InputError, UsageError
from blt_runtime.ids import OFFSET
from blt_runtime.patching import PatchRule, patch_lengths, to_bfloat16

FORMS = ("global", "monotonic")
FEWEST_DECIMALS, MOST_DECIMALS = 2, 9
Integers = NDArray[np.integer[Any]]
Float = NDArray[np.float32]


@dataclass(frozen=True)
class Piece:
    """A piece of text: ids [N] (BOS, bytes, and EOS if the document ends here), next-byte entropies [N] in nats."""

    ids: Integers
    entropies: Float

    @cached_property
    def n_bytes(self) -> int:
        return int((self.ids >= OFFSET).sum())


@dataclass(frozen=True)
class Sizes:
    """The counted patches of some text: its bytes, and the lengths [P] of the patches in tokens (an EOS is one)."""

    n_bytes: int
    lengths: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Bytes per patch."""
        return self.n_bytes / max(1, len(self.lengths))

    def percentile(self, share: float) -> int:
        """The length that `share` percent of the patches do not exceed."""
        return int(np.percentile(self.lengths, share, method="inverted_cdf"))


def sizes(rule: PatchRule, pieces: Sequence[Piece]) -> Sizes:
    """The patches of `pieces` under a rule of any scheme."""
    found = [_lengths(rule, piece)[1:] for piece in pieces]
    return Sizes(sum(piece.n_bytes for piece in pieces), np.concatenate([np.empty(0, np.int64), *found]))


def mean_patch_size(rule: PatchRule, pieces: Sequence[Piece]) -> float:
    """Bytes per patch."""
    patches = sum(len(_lengths(rule, piece)) - 1 for piece in pieces)
    return sum(piece.n_bytes for piece in pieces) / max(1, patches)


def _lengths(rule: PatchRule, piece: Piece) -> NDArray[np.int64]:
    entropies = piece.entropies if rule.needs_entropy else None
    return patch_lengths(rule, piece.ids, entropies, include_next_token=False)


def base_rule(own: PatchRule | None, form: str | None = None) -> PatchRule:
    """The entropy rule whose threshold is to be chosen, with the other settings of the model's `own` rule.

    form: global or monotonic; None for that of `own`, or global without one. Raises UsageError for an unknown form and
    for a rule without threshold.
    """
    if form not in (None, *FORMS):
        raise UsageError(f"--rule {form}: choose {' or '.join(FORMS)}")
    if own is not None and not own.needs_entropy:
        if form is None:
            raise UsageError(
                f"this model cuts text by the scheme {own.scheme!r}, which has no threshold; "
                "--rule global gives it a rule that it was not trained with"
            )
        own = PatchRule(threshold=0.0, max_patch_length=own.max_patch_length)
    own = own or PatchRule(threshold=0.0)
    return own if form is None else replace(own, monotonic=form == "monotonic", threshold_add=None)


def halves(pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Every second piece to choose on, and the others, held out. Raises InputError if there are fewer than two."""
    if len(pieces) < 2:
        raise InputError(
            "the text is a single piece; calibration needs two, one to choose the threshold on and one held out: "
            "give more text or a smaller --context"
        )
    return list(pieces[::2]), list(pieces[1::2])


def find_rule(rule: PatchRule, pieces: Sequence[Piece], mean: float) -> PatchRule:
    """`rule` with the threshold whose mean patch size on `pieces` is closest to `mean` bytes.

    The threshold is between two neighbouring keys, with the fewest decimals that move no boundary. Raises UsageError if
    `mean` is outside the range that thresholds reach on this text.
    """
    keys = _keys(rule, pieces)

    def at(step: int) -> float:
        """The mean with all but the `step` lowest keys above the threshold."""
        return mean_patch_size(replace(rule, threshold=_lowest(keys, step)), pieces)

    smallest, largest = at(0), at(len(keys))
    if not smallest <= mean <= largest:
        longest = f" (max_patch_length {rule.max_patch_length})" if rule.max_patch_length else ""
        raise UsageError(
            f"no threshold gives patches of {mean:g} bytes on this text, only {smallest:.2f} to {largest:.2f}{longest}"
        )
    step = bisect_left(range(len(keys)), mean, key=at)
    if step and mean - at(step - 1) <= at(step) - mean:
        step -= 1
    return replace(rule, threshold=_between(rule, pieces, keys, step))


def _keys(rule: PatchRule, pieces: Sequence[Piece]) -> Float:
    """The sorted distinct numbers that the rule compares with its threshold, rounded as it does. Raises InputError.

    Left out are token 0, which always closes its patch, token 1 for the monotonic rule, and the last token, which
    closes no patch yet.
    """
    if any(not np.isfinite(piece.entropies).all() for piece in pieces):
        raise InputError("some entropies are not finite: the entropy model is damaged")
    rounded = to_bfloat16 if rule.entropy_dtype == "bfloat16" else np.float32
    rows = [np.asarray(rounded(piece.entropies)) for piece in pieces]
    keys = [rounded(np.diff(row[1:-1])) if rule.monotonic else row[1:-1] for row in rows]
    return np.unique(np.concatenate([np.empty(0, np.float32), *keys]))


def _lowest(keys: Float, step: int) -> float:
    """The lowest threshold at which the `step` lowest keys open no patch (the comparison is strict)."""
    if step:
        return float(keys[step - 1])
    return float(keys[0]) - 1.0 if len(keys) else 0.0


def _between(rule: PatchRule, pieces: Sequence[Piece], keys: Float, step: int) -> float:
    """A number with few decimals between the neighbours of a step, which gives the same patches as `_lowest`."""
    low = _lowest(keys, step)
    high = float(keys[step]) if step < len(keys) else low + 1.0
    target = mean_patch_size(replace(rule, threshold=low), pieces)
    for decimals in range(FEWEST_DECIMALS, MOST_DECIMALS + 1):
        short = round((low + high) / 2, decimals) + 0.0  # -0.0 becomes 0.0
        # A rule that compares in bfloat16 also rounds the threshold, perhaps to a neighbour; so the mean is measured.
        inside = low < float(np.float32(short)) < high
        if inside and mean_patch_size(replace(rule, threshold=short), pieces) == target:
            return short
    return low  # there is no float32 between the neighbours


def relative_error(found: float, target: float) -> float:
    """The relative difference of a mean from its target; infinite for NaN."""
    return math.inf if math.isnan(found) else abs(found / target - 1)
