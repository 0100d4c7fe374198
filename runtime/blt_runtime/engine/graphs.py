"""The four graphs over the bytes of one stream, bound to staging buffers: a decode step, a speculative pass, a prefill.

`Graphs` copies a call's inputs from the stream's memory into staging buffers, runs the graph, and copies the outputs
back. Callers choose the positions: each call must stay within what `caches.calls` allows. One instance serves calls
over up to `longest` tokens.

Letters: S tokens of a call, P patches of a call, L bytes of the longest patch, W patches that a byte reads,
V vocabulary, X cross-attention layers, K heads and D width of a patch vector, R rows of patch vectors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from ..backends.protocol import Array, Buffer, Call, Place
from ..ids import Ids
from .memory import Memory

SHORTEST = 8
"""Entries per patch of the smallest latent call that is kept."""
ONE_BY_ONE = 32
"""Up to this many tokens, hash embeddings are computed one by one, without allocating. Both forms are bit-identical."""

Note = Callable[[str, int, float], None]
"""Receives a call's graph, its tokens or patches, and its seconds."""


def entries(length: int) -> int:
    """Entries of a kept latent call for patches of up to `length` bytes: 8, 16, 32, ..."""
    return max(SHORTEST, 1 << (length - 1).bit_length())


class LatentInputs:
    """Where each patch of a latent call finds its byte states. own_P: None for a graph without `own_start`. resident:
    unused entries name the row after the patch (`spec.resident_spec`), else row 0."""

    def __init__(self, index_PL: Array, length_P: Array, own_P: Array | None, resident: bool = False) -> None:
        self.index_PL, self.length_P, self.own_P, self._resident = index_PL, length_P, own_P, resident
        self._range_L = np.arange(index_PL.shape[1])

    def set(self, i: int, row: int, length: int, own: int) -> None:
        """Patch i reads `length` rows of the byte states from `row` on; its own bytes begin at the `own`-th."""
        row_L = self.index_PL[i]
        row_L.fill(row + length if self._resident else 0)
        np.add(self._range_L[:length], row, out=row_L[:length])
        self.length_P[i] = length
        if self.own_P is not None:
            self.own_P[i] = own


class PatchRows(NamedTuple):
    """Patch vectors [R, X, 2, K, D] of consecutive patches; that of patch p is in row p - first."""

    buffer: Buffer
    first: int


class Graphs:
    """Calls over 1..`longest` tokens or patches of one stream.

    kept: bind a call once per size and keep it, for the few sizes of steps and passes. Latent calls then have 8, 16,
    32, ... entries. Otherwise calls are bound each time, and latent calls have the entries of their longest patch.
    note: receives the seconds of every call, without binding.
    """

    def __init__(self, memory: Memory, longest: int, kept: bool, note: Note | None = None) -> None:
        self.memory, self.longest = memory, longest
        self._kept, self._note = kept, note
        self._staging_place: Place = "step" if kept else "host"
        self._bound: dict[tuple[str, int], Call] = {}
        self._latent_bound: dict[tuple[int, int], tuple[LatentInputs, Call]] = {}
        self._latent_pool = memory.pool.buffer
        self._width_W = np.arange(-memory.spec.decoder_window, 0)
        self._stage(memory)

    def _stage(self, memory: Memory) -> None:
        """Staging buffers [1, `longest`, ...]. The byte graphs share ids, positions, documents and byte states."""
        self._whole: dict[str, dict[str, Buffer]] = {name: {} for name in memory.graphs}
        if memory.spec.resident:
            self._whole["decoder"]["byte_states"] = memory.pool.buffer
        encoder = self._new("encoder")
        decoder = self._new("decoder", encoder)
        self._staging = {"encoder": encoder, "decoder": decoder, "latent": self._new("latent")}
        self.ids_S, self.position_S, self.document_S = (
            encoder[name].array[0] for name in ("ids", "positions", "doc_start")
        )
        self.states_SXD: Array | None = None if memory.spec.resident else encoder["byte_states"].array[0]
        self.patch_row_SW, self.logits_SV = (decoder[name].array[0] for name in ("patch_row", "logits"))
        self._latent_P = {name: buffer.array[0] for name, buffer in self._staging["latent"].items()}
        if "entropy" in memory.graphs:
            shared = {name: encoder[name] for name in ("ids", "positions")}
            entropy = self._staging["entropy"] = self._new("entropy", shared)
            self.entropy_document_S, self.entropy_S, self._entropy_logits_SV = (
                entropy[name].array[0] for name in ("doc_start", "entropy", "logits")
            )
        self.hash_SD: dict[str, Array] = {
            name: self._staging[name]["hash_embedding"].array[0] for name in memory.hashes
        }

    def _new(self, graph: str, shared: Mapping[str, Buffer] | None = None) -> dict[str, Buffer]:
        """Staging buffers of a graph, `shared` ones included. Its caches and the inputs in _WHOLE have none."""
        found, bound = self.memory.graphs[graph], (*_WHOLE[graph], *self._whole[graph])
        names = [name for name in found.tensors() if name not in bound]
        kept = shared or {}
        new = partial(found.new, place=self._staging_place, S=self.longest, P=self.longest)
        return {n: kept[n] if n in kept else new(n) for n in names}

    def entropy(self, a: int, b: int) -> Array:
        """The entropy model over positions a..b: their entropies go into the history. Returns its logits [S, V],
        which the next call overwrites."""
        memory, n = self.memory, b - a
        call, began = self.call("entropy", n), time.perf_counter()
        self._place(a, b)
        self.entropy_document_S[:n] = memory.entropy_documents.array[0, a:b]
        self._embed("entropy", a, b)
        call()
        memory.entropies.array[0, a:b] = self.entropy_S[:n]
        self._report("entropy", n, began)
        logits_SV: Array = self._entropy_logits_SV[:n]
        return logits_SV

    def encode(self, a: int, b: int) -> None:
        """The encoder over positions a..b. Their byte states go into the pool."""
        memory, pool, n = self.memory, self.memory.pool, b - a
        call, began = self.call("encoder", n), time.perf_counter()
        self._place(a, b)
        self.document_S[:n] = memory.documents.array[0, a:b]
        self._embed("encoder", a, b)
        call()
        if self.states_SXD is not None:
            pool.reserve(a, b, keep=memory.first_byte(memory.patches))
            pool.keep(a, self.states_SXD[:n])
        self._report("encoder", n, began)

    def latent(self, p: int, q: int, into: PatchRows | None = None) -> None:
        """The latent transformer over complete patches p..q. Their vectors go into the memory's ring or `into`."""
        memory = self.memory
        if memory.spec.resident and (wrap := (p // memory.kv_rows + 1) * memory.kv_rows) < q:
            self.latent(p, wrap)  # a call writes consecutive rows
            return self.latent(wrap, q)
        call, began = self.latent_call(p, q), time.perf_counter()
        call()
        if not memory.spec.resident:
            self._keep_vectors(p, q, into)
        return self._report("latent", q - p, began)

    def latent_call(self, p: int, q: int) -> Call:
        """The bound call over complete patches p..q, whose inputs are set."""
        memory, n = self.memory, q - p
        reach = [memory.first_byte(patch) for patch in range(p, q)]
        ends = memory.starts_P[p + 1 : q + 1].tolist()
        lengths = [end - first for first, end in zip(reach, ends, strict=True)]
        inputs, call = self._latent_bound_for(n, max(lengths))
        base = memory.pool.base
        for i, (first, length, start) in enumerate(zip(reach, lengths, memory.starts_P[p:q].tolist(), strict=True)):
            inputs.set(i, first - base, length, start - first)
        self._latent_P["positions"][:n] = memory.positions.array[0, p:q]
        self._latent_P["doc_start"][:n] = memory.patch_documents.array[0, p:q]
        if memory.spec.resident:
            self._latent_P["patch_row"][:n] = memory.positions.array[0, p % memory.kv_rows :][:n]
        return call

    def _keep_vectors(self, p: int, q: int, into: PatchRows | None) -> None:
        memory, vectors = self.memory, self._latent_P["patch_kv"][: q - p]
        if into is not None:
            into.buffer.array[p - into.first : q - into.first] = vectors
        elif q - p == 1:
            memory.kv_ring.array[p % memory.kv_rows] = vectors[0]
        else:
            memory.kv_ring.array[np.arange(p, q) % memory.kv_rows] = vectors

    def decode(self, a: int, b: int, complete_S: Ids, patches: PatchRows | None = None) -> Array:
        """The decoder over positions a..b, each of which reads the last W of its complete patches: those before
        complete_S, from the memory's ring or from `patches`. Returns its logits [S, V], which the next call
        overwrites."""
        memory, pool, n = self.memory, self.memory.pool, b - a
        call = self.call("decoder", n) if patches is None else self._bind("decoder", n, patches.buffer)
        began = time.perf_counter()
        self.position_S[:n] = memory.positions.array[0, a:b]
        self.document_S[:n] = memory.documents.array[0, a:b]
        if self.states_SXD is not None:
            self.states_SXD[:n] = pool.states(a, b)
        patch_SW = complete_S[:, None] + self._width_W
        row_SW = patch_SW % memory.kv_rows if patches is None else patch_SW - patches.first
        self.patch_row_SW[:n] = np.where(patch_SW >= 0, row_SW, -1)
        call()
        self._report("decoder", n, began)
        logits_SV: Array = self.logits_SV[:n]
        return logits_SV

    def call(self, graph: str, n: int) -> Call:
        """The call of the entropy model, the encoder or the decoder over n tokens of the staging."""
        return self._bound.get((graph, n)) or self._bind(graph, n, self.memory.kv_ring)

    def _bind(self, name: str, n: int, patch_kv: Buffer) -> Call:
        buffers = _first(self._staging[name], n) | self._whole[name]
        if name == "decoder":
            buffers["patch_kv"] = patch_kv
        call = self.memory.graphs[name].bind(**buffers)
        if self._kept:
            self._bound[name, n] = call
        return call

    def _latent_bound_for(self, patches: int, length: int) -> tuple[LatentInputs, Call]:
        """The call over that many patches of up to `length` bytes. Bound again if the pool's buffer was replaced."""
        if self._latent_pool is not self.memory.pool.buffer:
            self._latent_pool = self.memory.pool.buffer
            self._latent_bound.clear()
        size = entries(length) if self._kept else length
        return self._latent_bound.get((patches, size)) or self._bind_latent(patches, size)

    def _bind_latent(self, patches: int, size: int) -> tuple[LatentInputs, Call]:
        graph = self.memory.graphs["latent"]
        index = graph.new("byte_index", self._staging_place, P=patches, L=size)
        rows = _first(self._staging["latent"], patches)
        inputs = LatentInputs(
            index.array[0],
            self._latent_P["patch_length"],
            self._latent_P.get("own_start"),
            resident=self.memory.spec.resident,
        )
        bound = inputs, graph.bind(**rows, byte_states=self._latent_pool, byte_index=index)
        if self._kept:
            self._latent_bound[patches, size] = bound
        return bound

    def _place(self, a: int, b: int) -> None:
        memory, n = self.memory, b - a
        self.ids_S[:n] = memory.ids.array[0, memory.pad + a : memory.pad + b]
        self.position_S[:n] = memory.positions.array[0, a:b]

    def _embed(self, graph: str, a: int, b: int) -> None:
        """The hash embeddings of positions a..b, if the graph has any."""
        hash, window = self.memory.hashes.get(graph), self.memory.window
        if hash is None:
            return
        out_SD = self.hash_SD[graph]
        if b - a > ONE_BY_ONE:
            return hash.many(window(a, b, hash), out_SD[: b - a])
        for s in range(b - a):
            hash.one(window(a + s, a + s + 1, hash), out_SD[s])

    def _report(self, graph: str, n: int, began: float) -> None:
        if self._note is not None:
            self._note(graph, n, time.perf_counter() - began)


_WHOLE = {"entropy": (), "encoder": (), "latent": ("byte_states", "byte_index"), "decoder": ("patch_kv",)}
"""Inputs that are bound whole, without staging: their sizes do not depend on the tokens of a call."""


def _first(staging: Mapping[str, Buffer], n: int) -> dict[str, Buffer]:
    """The first n tokens or patches of every buffer."""
    return {name: buffer.part(0, (1, n, *buffer.shape[2:])) for name, buffer in staging.items()}


def longest_pass(memory: Memory, drafts: int) -> int:
    """Tokens of the longest speculative pass with up to `drafts` drafts that all caches and the chunk allow."""
    caches = [graph.spec.cache for name, graph in memory.graphs.items() if name != "latent"]
    return max(1, min(1 + drafts, memory.spec.chunk, *(cache.longest_call for cache in caches if cache is not None)))
