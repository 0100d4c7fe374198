"""The calls of a single step, bound once to one-token buffers. What differs from byte to byte is written
into them.

The latent transformer has one call per power of two of patch length, bound when first needed; all others
are one call each.

Letters: L entries of a latent call, W patches that a byte reads, V vocabulary, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..backends.protocol import Array, Buffer, Call
from ..ids import EOS, NEWLINE
from .memory import Mark, Memory

SHORTEST = 8
"""Entries of the smallest latent call."""


def entries(length: int) -> int:
    """Entries of the latent call for patches of up to `length` bytes: 8, 16, 32, ..."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


class LatentCall(NamedTuple):
    """A latent call over one patch of up to L bytes."""

    index_L: Array
    run: Call


class StepCalls:
    """Bound calls over a stream's memory: `entropy`, `encoder`, `decoder`, and `latent` at a patch's end. `take` makes
    them for one token."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._with_entropy = memory.spec.patch_rule.needs_entropy
        self._range = np.arange(SHORTEST, dtype=np.int64)
        graphs = memory.graphs
        encoder, decoder = graphs["encoder"], graphs["decoder"]
        self._clock = {"positions": encoder.new("positions", S=1), "doc_start": encoder.new("doc_start", S=1)}
        self._ids = encoder.new("ids", S=1)
        self._state = encoder.new("byte_states", S=1)
        self._patch_row = decoder.new("patch_row", S=1)
        self.patch_row_W: Array = self._patch_row.array[0, 0]
        logits = decoder.new("logits", S=1)
        self.logits_V: Array = logits.array[0, 0]
        self._bind_entropy()
        self._bind_encoder()
        self.decoder = decoder.bind(
            **self._clock,
            byte_states=self._state,
            patch_kv=memory.kv_ring,
            patch_row=self._patch_row,
            logits=logits,
        )
        self._make_latent()
        self._id, self._position, self._document = (
            self._ids.array[0],
            self._clock["positions"].array[0],
            self._clock["doc_start"].array[0],
        )

    def _bind_entropy(self) -> None:
        self._entropy_document = self._clock["doc_start"].array[0]
        graph = self._memory.graphs.get("entropy")
        if graph is None:
            return
        document = graph.new("doc_start", S=1)
        self._entropy_document = document.array[0]
        value = graph.new("entropy", S=1)
        self._entropy_value = value.array[0]
        logits = graph.new("logits", S=1)
        self.entropy = graph.bind(
            positions=self._clock["positions"],
            doc_start=document,
            ids=self._ids,
            entropy=value,
            logits=logits,
        )

    def _bind_encoder(self) -> None:
        graph, extra = self._memory.graphs["encoder"], {}
        if graph.spec.has_input("hash_embedding"):
            extra["hash_embedding"] = graph.new("hash_embedding", S=1)
            self.hash_D: Array = extra["hash_embedding"].array[0, 0]
        self.encoder = graph.bind(**self._clock, ids=self._ids, byte_states=self._state, **extra)

    def _make_latent(self) -> None:
        graph = self._memory.graphs["latent"]
        self._latent_calls: dict[int, LatentCall] = {}
        self._latent_pool = self._memory.pool.buffer
        self._latent_clock = {n: graph.new(n, P=1) for n in ("patch_length", "positions", "doc_start")}
        if graph.spec.has_input("own_start"):
            self._latent_clock["own_start"] = graph.new("own_start", P=1)
        self._kv = graph.new("patch_kv", P=1)

    def take(self, id: int) -> None:
        """Takes in one token: everything that the next byte depends on is computed here."""
        memory = self._memory
        memory.check_room(1)
        t = memory.position
        self.set_token(id, t)
        entropy = 0.0
        if self._with_entropy:
            self.entropy()
            entropy = self.entropy_of(t)
        if memory.hash is not None:
            memory.hash.one(memory.window(t, t + 1), self.hash_D)
        self.encoder()
        self.keep_state(t)
        memory.position = t + 1
        if memory.rule.closes(id, entropy):
            self.latent(t + 1)
            memory.marks.append(Mark(t + 1, memory.patches, memory.rule.copy()))
        self.decoder()

    def set_token(self, id: int, t: int) -> None:
        """Places id at position t: one-token inputs, history, and the documents of what follows."""
        memory = self._memory
        document = memory.documents.array[0, t]
        memory.ids.array[0, memory.pad + t] = id
        self._id[0], self._position[0], self._document[0] = id, t, document
        memory.documents.array[0, t + 1] = t + 1 if id == EOS else document
        if memory.entropy_documents is memory.documents:
            self._entropy_document[0] = document
            return
        entropy_documents_N = memory.entropy_documents.array[0]
        self._entropy_document[0] = entropy_documents_N[t]
        entropy_documents_N[t + 1] = t + 1 if id in (EOS, NEWLINE) else entropy_documents_N[t]

    def entropy_of(self, t: int) -> float:
        """The entropy (nats) just computed, also kept in the history at t."""
        value: float = self._entropy_value.item()
        self._memory.entropies.array[0, t] = value
        return value

    def keep_state(self, t: int) -> None:
        """Puts the byte state just computed into the pool, at position t."""
        pool = self._memory.pool
        if t - pool.base >= pool.rows:
            pool.reserve(t, t + 1, keep=self._memory.first_byte(self._memory.patches))
        pool.buffer.array[t - pool.base] = self._state.array[0, 0]

    def latent(self, end: int) -> None:
        """The open patch ends before position `end`: one latent step, then the decoder reads it."""
        memory, clock = self._memory, self._latent_clock
        patch, first = memory.patches, memory.first_byte(memory.patches)
        length = end - first
        call = self._latent_call(length)
        call.index_L.fill(0)
        np.add(self._range[:length], first - memory.pool.base, out=call.index_L[:length])
        clock["patch_length"].array[0, 0] = length
        clock["positions"].array[0, 0] = patch
        clock["doc_start"].array[0, 0] = memory.patch_documents.array[0, patch]
        if "own_start" in clock:
            clock["own_start"].array[0, 0] = memory.starts_P[patch] - first
        call.run()
        memory.kv_ring.array[patch % memory.kv_rows] = self._kv.array[0, 0]
        memory.close_patch(end)
        self.read_patches()

    def read_patches(self) -> None:
        """Points the decoder at the last W finished patches."""
        memory, rows_W = self._memory, self._patch_row.array[0, 0]
        width = len(rows_W)
        for w in range(width):
            patch = memory.patches - width + w
            rows_W[w] = patch % memory.kv_rows if patch >= 0 else -1

    def _latent_call(self, length: int) -> LatentCall:
        """The call over 8, 16, 32, ... entries that fits; bound again after the pool has moved."""
        if self._latent_pool is not self._memory.pool.buffer:
            self._latent_pool = self._memory.pool.buffer
            self._latent_calls.clear()
        size = entries(length)
        return self._latent_calls.get(size) or self._bind_latent(size)

    def _bind_latent(self, size: int) -> LatentCall:
        graph = self._memory.graphs["latent"]
        index: Buffer = graph.new("byte_index", P=1, L=size)
        run = graph.bind(**self._latent_clock, byte_states=self._latent_pool, byte_index=index, patch_kv=self._kv)
        if len(self._range) < size:
            self._range = np.arange(size, dtype=np.int64)
        self._latent_calls[size] = LatentCall(index.array[0, 0], run)
        return self._latent_calls[size]
