"""Patch boundaries ahead of the step: a patch rule over the entropies of a frozen model, cached next to the data.

For training, each document (BOS, bytes, EOS) is evaluated alone and exactly, as in generation (`blt.data.entropies`).
The cache (`blt.data.entropy_cache`) stores entropies, not boundaries, so another threshold or rule costs nothing. It
holds the documents that were needed so far, and grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blt.data.batches import Int, never
from blt.data.dataset import Dataset, Documents
from blt.data.entropies import Float
from blt.data.entropy_cache import EntropyCache
from blt.data.starts import block_boundaries
from blt.data.threshold import Piece, find_rule
from blt.model import EntropyModel
from blt_runtime.errors import ConfigError, UsageError
from blt_runtime.patching import PatchRule, patch_lengths

SAMPLE_TOKENS = 1 << 19
"""Of the training documents, to choose a threshold on."""


class PatchIndex:
    """Patch boundaries of every document of a split under a rule.

    `model` is needed for rules that use entropies. These are computed at first use, or ahead of it by `compute`, and
    cached in the data folder.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        model: EntropyModel | None = None,
        *,
        reset_newlines: bool = False,
        rule: PatchRule | None = None,
        compile: bool = False,
    ):
        self.dataset, self.split, self.rule = dataset, split, rule
        self.reset_newlines = reset_newlines
        self.documents = dataset.split(split)
        self.cache = None if model is None else EntropyCache(dataset, split, model, reset_newlines, compile)

    def with_rule(self, rule: PatchRule) -> PatchIndex:
        """The same entropies under another rule. Raises ConfigError if the rule needs other entropies."""
        if rule.needs_entropy and (self.cache is None or rule.reset_newlines != self.reset_newlines):
            raise ConfigError("this patch rule needs other entropies; give the entropy model it was made for")
        other = PatchIndex(self.dataset, self.split, rule=rule, reset_newlines=self.reset_newlines)
        other.cache = self.cache
        return other

    @property
    def key(self) -> str:
        """Identifies the entropy model and how it is evaluated; empty without one."""
        return "" if self.cache is None else self.cache.key

    @property
    def path(self) -> Path:
        """The cache file of this split, which needs a model."""
        assert self.cache is not None
        return self.cache.path

    def compute(self, members: Int | None = None, stopped: Callable[[], bool] = never) -> None:
        """Computes the entropies of these documents (default: all) now, unless they are cached.

        Raises CancelledError soon after `stopped()` is true.
        """
        if self.cache is not None and len(self.documents):
            self.cache.compute(np.arange(len(self.documents)) if members is None else members, stopped)

    def computed(self, members: Int) -> bool:
        """Whether the boundaries of these documents follow without running the entropy model."""
        return self.cache is None or self.cache.has(members)

    def starts(self, document: int) -> NDArray[np.bool_]:
        """True where a patch begins, [length + 2] over BOS ... EOS."""
        assert self.rule is not None
        entropies = self.entropies(document) if self.rule.needs_entropy else None
        return starts_of(self.rule, self.documents.ids(document), entropies)

    def boundaries(self, members: Int) -> Int:
        """Where patches begin in the tokens of these documents, one after another: ascending."""
        assert self.rule is not None
        entropies = self.cache.of_all if self.cache is not None and self.rule.needs_entropy else None
        return block_boundaries(self.rule, self.documents, members, entropies)

    def entropies(self, document: int) -> Float:
        """Next-byte entropies in nats, [length + 2]."""
        assert self.cache is not None
        return self.cache.of(document)


def starts_of(rule: PatchRule, ids: NDArray[np.integer[Any]], entropies: Float | None) -> NDArray[np.bool_]:
    """True where a patch begins, [N], of a document's ids [N] (BOS ... EOS) and their entropies [N] in nats."""
    lengths = patch_lengths(rule, ids, entropies, include_next_token=False)
    starts = np.zeros(int(lengths.sum()), np.bool_)
    starts[np.cumsum(lengths) - lengths] = True
    return starts


def choose_threshold(
    index: PatchIndex,
    rule: PatchRule,
    target: float,
    members: Sequence[int] | Int,
) -> float:
    """The threshold in nats at which the mean patch size of `rule` is closest to `target` bytes, on a sample of
    `members` (`sample_documents`).

    Bytes per patch are counted as in `blt calibrate` and `blt eval`. Raises ConfigError if no threshold reaches the
    target.
    """
    sample = sample_documents(index.documents, members)
    index.compute(sample)
    try:
        found = find_rule(rule, [Piece(index.documents.ids(i), index.entropies(i)) for i in sample.tolist()], target)
    except UsageError as error:
        raise ConfigError(f"{error}; change patching.target_patch_size or patching.max_patch_length") from None
    assert found.threshold is not None
    return found.threshold


def sample_documents(documents: Documents, members: Sequence[int] | Int) -> Int:
    """A sample of `members` with about SAMPLE_TOKENS tokens, the same in every run."""
    order = np.random.default_rng(0).permutation(np.asarray(members, np.int64))
    total = np.cumsum(documents.lengths[order] + 2)
    return order[: int(np.searchsorted(total, SAMPLE_TOKENS)) + 1]
