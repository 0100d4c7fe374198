"""The reference for streams on the null backend: its graphs' results, computed at once and without caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from blt_runtime.backends.null import MODULUS, NATS, SLICES, WIDTH
from blt_runtime.bundle.spec import CacheSpec, ModelSpec
from blt_runtime.hashing import hash_ids
from blt_runtime.ids import EOS, NEWLINE, VOCAB
from blt_runtime.patching import patch_lengths


@dataclass(frozen=True)
class Expected:
    entropies: np.ndarray
    patch_lengths: np.ndarray
    logits: np.ndarray


def documents_of(ends: np.ndarray) -> np.ndarray:
    start, out = 0, []
    for t, ends_here in enumerate(ends):
        out.append(start)
        start = t + 1 if ends_here else start
    return np.array(out, dtype=np.int64)


def mix(values: np.ndarray, documents: np.ndarray, window: int | None) -> np.ndarray:
    out = np.empty(len(values))
    for t in range(len(values)):
        first = documents[t] if window is None else max(documents[t], t - window + 1)
        visible = np.arange(first, t + 1)
        out[t] = ((values[visible] + 1) * (1 + (t - visible) % 7)).sum() % MODULUS
    return out


def peaks(values: np.ndarray) -> np.ndarray:
    return -np.abs(np.arange(VOCAB) - (values % VOCAB)[:, None]) / 8


def cache_of(spec: ModelSpec, graph: str) -> CacheSpec:
    cache = spec.graphs[graph].cache
    assert cache is not None
    return cache


def compute(
    spec: ModelSpec, ids: np.ndarray, tables: Mapping[str, np.ndarray], lengths: np.ndarray | None = None
) -> Expected:
    window = cache_of(spec, "encoder").window
    documents = documents_of(ids == EOS)
    ends = (ids == EOS) | (spec.patch_rule.reset_newlines & (ids == NEWLINE))
    entropies = np.full(len(ids), np.nan, dtype=np.float32)
    if "entropy" in spec.graphs:
        values = values_of("entropy", spec, ids, tables)
        entropies = (mix(values, documents_of(ends), window) / NATS).astype(np.float32)
    if lengths is None:
        lengths = patch_lengths(spec.patch_rule, ids, entropies)
    mixed = mix(values_of("encoder", spec, ids, tables), documents, window)
    states = (mixed[:, None] + np.arange(WIDTH)) % MODULUS
    return Expected(entropies, lengths, decode(spec, ids, states, lengths, documents, window))


def values_of(graph: str, spec: ModelSpec, ids: np.ndarray, tables: Mapping[str, np.ndarray]) -> np.ndarray:
    """One value per token, of its id and of the n-grams that end there."""
    hash = spec.hashes.get(graph)
    if hash is None:
        return ids % MODULUS
    rows = hash_ids(ids, hash.sizes, hash.functions, hash.rows)
    embedding = tables[graph][rows + np.arange(hash.tables) * hash.rows].sum(axis=(1, 2))
    return (ids % MODULUS + embedding) % MODULUS


def decode(
    spec: ModelSpec,
    ids: np.ndarray,
    states: np.ndarray,
    lengths: np.ndarray,
    documents: np.ndarray,
    window: int | None,
) -> np.ndarray:
    ends = np.cumsum(lengths)[:-1]
    starts = np.concatenate([[0], ends])[:-1]
    sums = states.sum(axis=1)
    values = np.empty(len(ends))
    for j, (start, end) in enumerate(zip(starts, ends, strict=True)):
        first = starts[max(0, j - spec.encoder_window + 1)]
        entries = np.arange(end - first)
        own = start - first if spec.encoder_window > 1 else 0
        values[j] = (sums[first:end] * (entries + 1 + 13 * (entries >= own))).sum() % MODULUS
    has_eos = np.array([(ids[s:e] == EOS).any() for s, e in zip(starts, ends, strict=True)], dtype=bool)
    patch_documents = documents_of(has_eos & spec.latent_document_mask)
    latent_window = cache_of(spec, "latent").window
    kv = mix(values, patch_documents, latent_window) % MODULUS  # the first of SLICES * 2 * WIDTH entries
    assert SLICES * 2 * WIDTH > 1
    read = np.zeros(len(ids))
    for t in range(len(ids)):
        complete = int((ends <= t + 1).sum())
        for w in range(spec.decoder_window):
            patch = complete - spec.decoder_window + w
            read[t] += (kv[patch] + 1) * (w + 1) if patch >= 0 else 0
    return peaks(mix(sums % MODULUS, documents, window) * 5 + read * 3)
