"""The inputs of the parity check: one deterministic id sequence and every graph input that follows from it.

The sequence is longer than every window, so that all ring caches wrap. It contains text, multi-byte characters, all 256
raw bytes, EOS inside the row and newlines. Patch lengths are a fixed mixture, not the rule's: a rule may choose one
patch or a thousand, but the check needs short, long and single-byte patches at any threshold.

Letters: N tokens, P patches, L longest patch (times the encoder's window), W patches a byte reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import numpy.typing as npt

from blt_runtime import ids as tokens
from blt_runtime.bundle.spec import CacheSpec, GraphSpec, ModelSpec
from blt_runtime.engine.caches import calls

Array = npt.NDArray[np.int64]
_TEXT = "Bytes, not tokens.\nGrüße — байты, 字节, 🙂 and e\u0301. The quick brown fox; 0123456789.\n"
_PATCHES = (1, 4, 1, 7, 3, 16, 2, 1, 5, 9, 1, 1, 6)
_CALLS = (1, 1, 1, 1, 0, 3, 1, 1, 1, 1, 17, 0)
"""Tokens of the calls, repeated in this order; 0 is a whole chunk."""
_LEAST, _MORE = 640, 96


@dataclass(frozen=True)
class Plan:
    """Inputs of a whole row. `doc_start` by graph; `byte_index` [P, L], `patch_length`, `own_start` [P];
    `patch_row` [N, W]."""

    ids_N: Array
    doc_start: dict[str, Array]
    byte_index_PL: Array
    patch_length_P: Array
    own_start_P: Array
    patch_row_NW: Array


def make_plan(spec: ModelSpec) -> Plan:
    n = _tokens(spec)
    ids_N = sequence(n)
    ends_P = _patch_ends(n)[: spec.capacity_patches]
    document_N = _document_starts(ids_N == tokens.EOS)
    newline = spec.patch_rule.reset_newlines
    entropy_N = _document_starts((ids_N == tokens.EOS) | (newline & (ids_N == tokens.NEWLINE)))
    patch_document_P = _document_starts(_has_eos(ids_N, ends_P))
    if not spec.latent_document_mask:
        patch_document_P = np.zeros_like(patch_document_P)
    starts_P = np.concatenate([[0], ends_P[:-1]])
    first_P = starts_P[np.maximum(np.arange(len(ends_P)) - (spec.encoder_window - 1), 0)]
    longest = int((ends_P - first_P).max())
    index_PL = first_P[:, None] + np.arange(longest)
    index_PL = np.where(index_PL < ends_P[:, None], index_PL, 0)
    last_N = np.searchsorted(ends_P, np.arange(1, n + 1), side="right") - 1
    row_NW = np.maximum(last_N[:, None] - np.arange(spec.decoder_window)[::-1], -1)
    starts = {"entropy": entropy_N, "encoder": document_N, "decoder": document_N, "latent": patch_document_P}
    return Plan(
        ids_N,
        doc_start=starts,
        byte_index_PL=index_PL,
        patch_length_P=ends_P - first_P,
        own_start_P=starts_P - first_P,
        patch_row_NW=row_NW,
    )


def sequence(n: int) -> Array:
    """n ids: BOS, text, raw bytes, an EOS and BOS near one third and near the end."""
    rng = np.random.Generator(np.random.PCG64(0))
    raw = np.concatenate([np.arange(256), rng.integers(0, 256, 64)]).astype(np.uint8).tobytes()
    body = _TEXT.encode() + raw + _TEXT.encode()
    data = np.frombuffer(body * (n // len(body) + 1), np.uint8).astype(np.int64) + tokens.OFFSET
    for end in (n // 3, n - n // 8):
        data = np.insert(data, end, [tokens.EOS, tokens.BOS])
    data[0] = tokens.BOS
    return data[:n]


def graph_calls(n: int, graph: GraphSpec, spec: ModelSpec, doc_start: Array) -> Iterator[tuple[int, int]]:
    """Calls [a, b) over n positions: single steps and chunks, cut where this flavour must cut."""
    limits = cycle(_CALLS)
    start = 0
    while start < n:
        want = next(limits) or spec.chunk
        documents = None if spec.chunk_crosses_documents else doc_start[start:]
        stop = next(calls(start, n, graph.cache, min(want, spec.chunk), documents))[1]
        yield start, stop
        start = stop


def _tokens(spec: ModelSpec) -> int:
    """Enough to wrap every window's cache. A cache without window need not be full."""
    caches = [g.cache for name, g in spec.graphs.items() if name != "latent" and g.cache is not None]
    return min(spec.capacity_bytes, max(_LEAST, *(_wrap(cache) for cache in caches)))


def _wrap(cache: CacheSpec) -> int:
    return 0 if cache.window is None else cache.capacity + _MORE


def _patch_ends(n: int) -> Array:
    lengths = cycle(_PATCHES)
    ends = [1]
    next(lengths)
    while ends[-1] < n:
        ends.append(min(n, ends[-1] + next(lengths)))
    return np.array(ends, np.int64)


def _document_starts(ends_N: npt.NDArray[np.bool_]) -> Array:
    """Of each position, the first one after the last earlier position that ends a document."""
    after_N = np.where(ends_N, np.arange(1, len(ends_N) + 1), 0)
    return np.concatenate([[0], np.maximum.accumulate(after_N)[:-1]]).astype(np.int64)


def _has_eos(ids_N: Array, ends_P: Array) -> npt.NDArray[np.bool_]:
    count_N = np.concatenate([[0], np.cumsum(ids_N == tokens.EOS)])
    starts_P = np.concatenate([[0], ends_P[:-1]])
    has: npt.NDArray[np.bool_] = count_N[ends_P] > count_N[starts_P]
    return has
