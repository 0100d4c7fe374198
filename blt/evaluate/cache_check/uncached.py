"""The reference: whole rows by the training form, and how far a cached form may deviate from them.

A decision of the patch rule is `near` when an error within tolerance could flip it. A position is a `tie` when such
errors could exchange its two largest logits. Both are found by perturbing the uncached numbers, not the cached ones.

Letters: N tokens, M the first tokens of a row, P patches, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from blt.checkpoint.models import Checkpoint
from blt.model import entropy_of
from blt_runtime.ids import Ids
from blt_runtime.patching import Bools, PatchRule, closes_from_lengths, lengths_from_closes, patch_lengths

Floats = npt.NDArray[np.float32]


def scale(want: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What an error is relative to: the largest of a vector (or a number itself), at least 1."""
    return np.asarray(np.maximum(1.0, np.abs(want) if want.ndim == 1 else np.abs(want).max(-1)))


class Uncached:
    """A checkpoint that recomputes whole rows: `BLT.forward` and `EntropyModel.forward`, float32 on the CPU."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.blt, self.rule = checkpoint.require_blt()
        self.entropy = checkpoint.entropy

    @property
    def longest(self) -> int:
        """Most ids of a row: the shortest `max_seqlen` of the byte-level parts."""
        config = self.blt.config
        parts = [config.encoder, config.decoder, *([self.entropy.config] if self.entropy else [])]
        return min(part.max_seqlen for part in parts)

    @torch.inference_mode()
    def entropies(self, ids_N: Ids, reset_newlines: bool) -> Floats:
        """[N] nats; NaN without an entropy model."""
        if self.entropy is None:
            return np.full(len(ids_N), np.nan, np.float32)
        logits_1NV = self.entropy(torch.from_numpy(ids_N)[None], reset_newlines=reset_newlines)
        entropies_N: Floats = entropy_of(logits_1NV)[0].numpy()
        return entropies_N

    @torch.inference_mode()
    def logits(self, ids_N: Ids, closes_N: Bools) -> Floats:
        """[N, V] with patches that end where `closes_N` is true."""
        lengths_P = lengths_from_closes(closes_N, len(ids_N) + 1)
        longest = int(lengths_P[:-1].max(initial=1))
        ids_1N, lengths_1P = torch.from_numpy(ids_N)[None], torch.from_numpy(lengths_P)[None]
        logits_NV: Floats = self.blt(ids_1N, lengths_1P, longest)[0].numpy()
        return logits_NV

    def greedy(self, ids_N: Ids, n: int) -> list[int]:
        """`n` greedy ids after a prompt; each id recomputes the whole row."""
        for _ in range(n):
            entropies_N = self.entropies(ids_N, self.rule.reset_newlines)
            closes_N = closes_from_lengths(patch_lengths(self.rule, ids_N, entropies_N))
            ids_N = np.append(ids_N, self.logits(ids_N, closes_N)[-1].argmax())
        return [int(token) for token in ids_N[-n:]]

    def row(self, ids_N: Ids, rule: PatchRule, *, tolerance: float, most_patches: int | None = None) -> Row:
        """A row under a rule, cut where it would need more than `most_patches` patches."""
        entropies_N = self.entropies(ids_N, rule.reset_newlines)
        closes_N = closes_from_lengths(patch_lengths(rule, ids_N, entropies_N))
        end = len(ids_N)
        if most_patches is not None:
            end = int(np.searchsorted(np.cumsum(closes_N), most_patches, side="right"))
        scheme_N, near_N = decisions(rule, ids_N, entropies_N, tolerance=tolerance)
        return Row(
            uncached=self,
            rule=rule,
            tolerance=tolerance,
            ids_N=ids_N[:end],
            entropies_N=entropies_N[:end],
            closes_N=closes_N[:end],
            scheme_N=scheme_N[:end],
            near_N=near_N[:end],
        )


def decisions(rule: PatchRule, ids_N: Ids, entropies_N: Floats, *, tolerance: float) -> tuple[Bools, Bools]:
    """Where the scheme ends a patch, before max_patch_length; and where errors within tolerance could change that.

    A decision depends on its own entropy and, with the opposite sign, on the one before it. So moving even positions
    up and odd ones down, and then the reverse, gives the two extremes of each decision.
    """
    scheme = replace(rule, max_patch_length=None)
    scheme_N = closes_from_lengths(patch_lengths(scheme, ids_N, entropies_N))
    if not rule.needs_entropy:
        return scheme_N, np.zeros(len(ids_N), np.bool_)
    even_N = np.arange(len(ids_N)) % 2 == 0
    margin_N = np.where(even_N, tolerance, -tolerance) * scale(entropies_N)
    apart_N, against_N = (
        closes_from_lengths(patch_lengths(scheme, ids_N, entropies_N + sign * margin_N)) for sign in (1, -1)
    )
    return scheme_N, apart_N != against_N


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of ids [N] under one rule, computed without caches.

    closes_N: where patches end, with max_patch_length applied; scheme_N: without it; near_N: near decisions.
    """

    uncached: Uncached
    rule: PatchRule
    tolerance: float
    ids_N: Ids
    entropies_N: Floats
    closes_N: Bools
    scheme_N: Bools
    near_N: Bools

    def __len__(self) -> int:
        return len(self.ids_N)

    @cached_property
    def logits_NV(self) -> Floats:
        return self.uncached.logits(self.ids_N, self.closes_N)

    @cached_property
    def tie_N(self) -> Bools:
        """The two largest logits differ by at most two tolerances, one for each."""
        second_N, first_N = np.partition(self.logits_NV, -2, axis=-1)[:, -2:].T
        return np.asarray(first_N - second_N <= 2 * self.tolerance * scale(self.logits_NV))

    def logits_under(self, closes_M: Bools) -> Floats:
        """Logits [M, V] of the first M ids with the cached form's patch ends `closes_M`."""
        m = len(closes_M)
        if np.array_equal(closes_M, self.closes_N[:m]):
            return self.logits_NV[:m]
        return self.uncached.logits(self.ids_N[:m], closes_M)

    def moved(self, closes_M: Bools) -> tuple[list[int], list[int]]:
        """Positions where the cached form decided differently: the near ones, and the wrong ones.

        After each of them the walk follows the cached form, so that one decision counts once.
        """
        near, wrong = list[int](), list[int]()
        longest, length = self.rule.max_patch_length, 0
        for t, closes in enumerate(closes_M.tolist()):
            length += 1
            full = t == 0 or (longest is not None and length >= longest)
            if closes != (full or bool(self.scheme_N[t])):
                (near if self.near_N[t] and not full else wrong).append(t)
            length = 0 if closes else length
        return near, wrong


def forced(row: Row, lengths_P: Ids) -> Row:
    """The same ids cut into given patches. No decision is near, because the rule makes none."""
    closes_N, none_N = closes_from_lengths(lengths_P), np.zeros(len(row), np.bool_)
    rule = replace(row.rule, max_patch_length=None)
    return replace(row, rule=rule, closes_N=closes_N, scheme_N=closes_N, near_N=none_N)
