"""Bits of a text under a model: one interface for every kind of model.

A text follows BOS and an optional prompt. Its bits are those of its bytes and, on request, of a final EOS. This module
has the interface and the scorer on streams (bundles, cached PyTorch). `blt.evaluate.rows` scores whole rows.

Letters: N ids, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from blt.evaluate.texts import Document, cut
from blt_runtime.ids import OFFSET, encode

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blt_runtime import Score, Stream

Unit = Literal["patch", "byte", "token"]


class Scored(NamedTuple):
    """bits: of a text. units: patches, bytes or tokens that begin in it or at its EOS. greedy: whether greedy decoding
    would give the text."""

    bits: float
    units: int
    greedy: bool


class Scorer(ABC):
    """Scores texts. capacity: most bytes of a prompt and a text in total, None for no limit. unit: what the model
    processes in one step."""

    unit: Unit

    @property
    @abstractmethod
    def capacity(self) -> int | None: ...

    @abstractmethod
    def measure(self, text: bytes, prompt: bytes = b"", eos: bool = False, before: bytes = b"") -> Scored:
        """Bits and units of `text` after BOS and `prompt`; with `eos`, also of a final EOS. before: a byte that stands
        in place of BOS."""

    def measure_pieces(self, document: Document, context: int, continued: bool = False) -> Iterator[tuple[Scored, int]]:
        """The pieces of a document (`blt.evaluate.texts.cut`), scored one after the other, and their counted bytes.

        continued: a piece after the first begins with the byte (or token) before it, as a row of training does. If not,
        it begins with BOS.
        """
        for prompt, text, last, before in cut(document, context):
            yield self.measure(text, prompt, eos=last, before=before if continued else b""), len(text)

    def bits(self, text: bytes, prompt: bytes = b"", eos: bool = False) -> float:
        """-log2 p(`text` | `prompt`)."""
        return self.measure(text, prompt, eos).bits


@dataclass(frozen=True)
class StreamScorer(Scorer):
    """Scores with a stream of a BLT, from a checkpoint or a bundle. n_ids: the largest N."""

    stream: Stream
    n_ids: int
    unit: Unit = "patch"

    @property
    def capacity(self) -> int:
        return self.n_ids - 2

    def __call__(self, ids_N: NDArray[np.int64], lengths_P: NDArray[np.int64] | None = None) -> Score:
        """Entropies, patches and logits of ids [N]. lengths_P: patch lengths; None applies the patch rule."""
        return self.stream.score_ids(ids_N, lengths_P)

    def measure(self, text: bytes, prompt: bytes = b"", eos: bool = False, before: bytes = b"") -> Scored:
        ids_N = row_ids(prompt + text, eos, before)
        score = self(ids_N)
        first = 1 + len(prompt)
        return scored(score.logits, ids_N, first, patches_from(score.patch_lengths, first, len(ids_N)))


def row_ids(text: bytes, eos: bool, before: bytes = b"") -> NDArray[np.int64]:
    """BOS (or the byte `before`), text, EOS if `eos`; int64 [N]."""
    ids_N = encode(text, bos=True, eos=eos)
    if before:
        ids_N[0] = OFFSET + before[0]
    return ids_N


def scored(logits_NV: NDArray[np.float32], ids_N: NDArray[np.integer[Any]], first: int, units: int) -> Scored:
    """Bits and `units` of ids first..N-1. The logits at n predict id n + 1."""
    likeliest_N = logits_NV[first - 1 : len(ids_N) - 1].argmax(-1)
    return Scored(bits_of(logits_NV, ids_N, first), units, bool((likeliest_N == ids_N[first:]).all()))


def bits_of(logits_NV: NDArray[np.float32], ids_N: NDArray[np.integer[Any]], first: int = 1) -> float:
    """Bits of ids first..N-1. The logits at n predict id n + 1."""
    x_NV = logits_NV[first - 1 : len(ids_N) - 1]
    below_NV = x_NV - x_NV.max(-1, keepdims=True, initial=-np.inf)
    log_sum_N = np.log(np.exp(below_NV).sum(-1, dtype=np.float64))  # float32 exponentials: ten times faster
    chosen_N = np.take_along_axis(below_NV, ids_N[first:, None], 1)[:, 0].astype(np.float64)
    return float((log_sum_N - chosen_N).sum() / math.log(2))


def patches_from(lengths_P: NDArray[np.integer[Any]], first: int, n_ids: int) -> int:
    """Patches that begin at ids first..N-1."""
    starts_P = np.cumsum(lengths_P)[:-1]
    return int(((starts_P >= first) & (starts_P < n_ids)).sum())
