"""Texts for single streams and for the rows of a batch, which must compute the same. Needs no PyTorch.

The entropies of both forms differ by roundings, so the rows use a patch rule without entropies; entropies are compared
separately. The rows' prompts have different lengths: their patches end in different calls, which others wait out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from blt_runtime.bundle.spec import ModelSpec
from blt_runtime.engine.batch import Batch
from blt_runtime.ids import BOS, EOS, OFFSET
from blt_runtime.patching import PatchRule

TOKENS, PROMPT, PATCH = 45, 26, 4
Array = npt.NDArray[np.float32]


class Results(NamedTuple):
    """logits [rows, tokens after PROMPT, V]; entropies [rows, tokens], None without an entropy model."""

    logits: Array
    entropies: Array | None


def rule(longest: int = PATCH) -> PatchRule:
    """Patches of PATCH bytes, or of `longest` if that is less."""
    return PatchRule("static", patch_size=min(PATCH, longest))


def texts(spec: ModelSpec, rows: int) -> npt.NDArray[np.int64]:
    """Ids [rows, tokens] of two documents each; tokens are TOKENS, or what a stream of `spec` holds."""
    assert spec.patch_rule.patch_size is not None
    tokens = max(1, min(TOKENS, spec.capacity_bytes, spec.patch_rule.patch_size * (spec.capacity_patches - 1)))
    ids = np.random.default_rng(0).integers(OFFSET, spec.vocab_size, (rows, tokens))
    ids[:, 0], ids[:, tokens // 3] = BOS, EOS
    return ids


def first(tokens: int) -> int:
    """The first position of a text whose logits are compared."""
    return min(PROMPT, tokens) - 1


def read(batch: Batch, text: npt.NDArray[np.int64]) -> Results:
    """Reads one text in each row: a prompt in slices, then single bytes."""
    (count, tokens), begin = text.shape, first(text.shape[1])
    logits: list[list[Array]] = [[] for _ in range(count)]
    rows = []
    for ids, prompt in zip(text, begin + 1 - np.arange(count) % min(3, begin + 1), strict=True):
        row = batch.open()
        assert row is not None
        row.feed(ids[:prompt])
        rows.append(row)
    while not all(row.done and row.placed == tokens for row in rows):
        for row in batch.round():
            if row.error is not None:
                raise row.error
            if row.placed > begin:
                logits[row.index].append(row.logits_V.copy())
            if row.placed < tokens:
                row.feed(text[row.index, row.placed : row.placed + 1])
    entropies = np.array([row.memory.entropies.array[0, :tokens] for row in rows])
    return Results(np.array(logits), entropies if "entropy" in batch.spec.graphs else None)
