"""Calls of the graphs over a few tokens or patches at once, for `speculate`: what `prefill` does, but bound beforehand.

A call is bound for each number of tokens (or of patches, and their longest) when it is first needed; all share the
same buffers, and what differs from pass to pass is written into them. Every call is timed for `pace`.

Letters: S tokens of a pass, V vocabulary, P patches of a call, L entries of the longest, W patches that a byte reads.
"""

from __future__ import annotations

import time

import numpy as np

from ..backends.protocol import Array, Buffer, Call
from ..ids import Ids
from ..speculation.adaptive import Costs
from .memory import AHEAD, Memory
from .step import LatentCall, entries


class PassCalls:
    """Calls over 1..`longest` tokens on buffers of their own, each bound when it is first needed and kept."""

    def __init__(self, memory: Memory, costs: Costs, longest: int) -> None:
        self._memory, self._costs, self.longest = memory, costs, longest
        self._bound: dict[tuple[str, int], Call] = {}
        self._latent_bound: dict[tuple[int, int], LatentCall] = {}
        self._latent_pool = memory.pool.buffer
        graphs = memory.graphs
        encoder, decoder = graphs["encoder"], graphs["decoder"]
        self._clock = {n: encoder.new(n, S=longest) for n in ("positions", "doc_start")}
        self._ids, self._states = encoder.new("ids", S=longest), encoder.new("byte_states", S=longest)
        self._hash = encoder.new("hash_embedding", S=longest) if memory.hash is not None else None
        self._patch_row, self._logits = decoder.new("patch_row", S=longest), decoder.new("logits", S=longest)
        self._width_W = np.arange(-memory.spec.decoder_window, 0)
        names = ("patch_length", "positions", "doc_start", "patch_kv", "own_start")
        latent = graphs["latent"]
        self._patches = {n: latent.new(n, P=AHEAD + 1) for n in names if n != "own_start" or latent.spec.has_input(n)}
        entropy = graphs.get("entropy")
        if entropy is not None:
            self._entropy = {n: entropy.new(n, S=longest) for n in ("doc_start", "entropy", "logits")}

    def read(self, start: int, end: int) -> Array:
        """The entropy model over positions start..end: entropies into the history. Its logits [S, V], for a while."""
        memory, n = self._memory, end - start
        call, began = self._call("entropy", n), time.perf_counter()
        self._place(start, end)
        self._entropy["doc_start"].array[0, :n] = memory.entropy_documents.array[0, start]
        call()
        memory.entropies.array[0, start:end] = self._entropy["entropy"].array[0, :n]
        self._costs.note("entropy", n, time.perf_counter() - began)
        logits_SV: Array = self._entropy["logits"].array[0, :n]
        return logits_SV

    def encode(self, start: int, end: int) -> None:
        """The encoder over positions start..end, all of one document; their states into the pool."""
        memory, pool, n = self._memory, self._memory.pool, end - start
        call, began = self._call("encoder", n), time.perf_counter()
        self._place(start, end)
        if self._hash is not None and memory.hash is not None:
            for s in range(n):
                memory.hash.one(memory.window(start + s, start + s + 1), self._hash.array[0, s])
        call()
        pool.reserve(start, end, keep=memory.first_byte(memory.patches))
        pool.buffer.array[start - pool.base : end - pool.base] = self._states.array[0, :n]
        self._costs.note("encoder", n, time.perf_counter() - began)

    def latent(self, first: int, end: int) -> None:
        """The latent transformer over patches first..end, all of one document; their vectors into the ring."""
        memory, n = self._memory, end - first
        starts_P = memory.starts_P[first : end + 1]
        reach_P = np.array([memory.first_byte(p) for p in range(first, end)])
        length_P = starts_P[1:] - reach_P
        call = self._latent_call(n, entries(int(length_P.max())))
        began = time.perf_counter()
        entry_L = np.arange(call.index_L.shape[1])
        row_PL = (reach_P - memory.pool.base)[:, None] + entry_L
        call.index_L[...] = np.where(entry_L < length_P[:, None], row_PL, 0)
        clock = {name: buffer.array[0] for name, buffer in self._patches.items()}
        clock["patch_length"][:n] = length_P
        clock["positions"][:n] = np.arange(first, end)
        clock["doc_start"][:n] = memory.patch_documents.array[0, first]
        if "own_start" in clock:
            clock["own_start"][:n] = starts_P[:-1] - reach_P
        call.run()
        memory.kv_ring.array[np.arange(first, end) % memory.kv_rows] = clock["patch_kv"][:n]
        self._costs.note("latent", n, time.perf_counter() - began)

    def decode(self, start: int, end: int, complete_S: Ids) -> Array:
        """The decoder over positions start..end, of which each reads the last of so many finished patches. Its logits
        [S, V], for a while."""
        memory, n = self._memory, end - start
        call, began = self._call("decoder", n), time.perf_counter()
        self._place(start, end)
        self._states.array[0, :n] = memory.pool.buffer.array[start - memory.pool.base : end - memory.pool.base]
        patch_SW = complete_S[:, None] + self._width_W
        self._patch_row.array[0, :n] = np.where(patch_SW >= 0, patch_SW % memory.kv_rows, -1)
        call()
        self._costs.note("decoder", n, time.perf_counter() - began)
        logits_SV: Array = self._logits.array[0, :n]
        return logits_SV

    def _place(self, start: int, end: int) -> None:
        memory, n = self._memory, end - start
        self._ids.array[0, :n] = memory.ids.array[0, memory.pad + start : memory.pad + end]
        self._clock["positions"].array[0, :n] = memory.positions.array[0, start:end]
        self._clock["doc_start"].array[0, :n] = memory.documents.array[0, start]

    def _call(self, graph: str, n: int) -> Call:
        return self._bound.get((graph, n)) or self._bind(graph, n)

    def _bind(self, name: str, n: int) -> Call:
        buffers = {**self._clock, "byte_states": self._states}
        if name == "entropy":
            buffers = {**self._clock, **self._entropy, "ids": self._ids}
        elif name == "encoder":
            buffers |= {"ids": self._ids} | ({} if self._hash is None else {"hash_embedding": self._hash})
        else:
            buffers |= {"patch_row": self._patch_row, "logits": self._logits}
        rows = {name: buffer.part(0, (1, n, *buffer.shape[2:])) for name, buffer in buffers.items()}
        whole = {"patch_kv": self._memory.kv_ring} if name == "decoder" else {}
        self._bound[name, n] = self._memory.graphs[name].bind(**rows, **whole)
        return self._bound[name, n]

    def _latent_call(self, patches: int, size: int) -> LatentCall:
        """The call over so many patches of up to `size` entries; bound again after the pool has moved."""
        if self._latent_pool is not self._memory.pool.buffer:
            self._latent_pool = self._memory.pool.buffer
            self._latent_bound.clear()
        return self._latent_bound.get((patches, size)) or self._bind_latent(patches, size)

    def _bind_latent(self, patches: int, size: int) -> LatentCall:
        graph = self._memory.graphs["latent"]
        index: Buffer = graph.new("byte_index", P=patches, L=size)
        rows = {name: buffer.part(0, (1, patches, *buffer.shape[2:])) for name, buffer in self._patches.items()}
        call = LatentCall(index.array[0], graph.bind(**rows, byte_states=self._latent_pool, byte_index=index))
        self._latent_bound[patches, size] = call
        return call


def longest_pass(memory: Memory, guesses: int) -> int:
    """Tokens of the longest pass with that many guesses that all caches and the chunk allow."""
    caches = [graph.spec.cache for name, graph in memory.graphs.items() if name != "latent"]
    return max(1, min(1 + guesses, memory.spec.chunk, *(cache.longest_call for cache in caches if cache is not None)))
