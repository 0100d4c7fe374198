"""All memory of one stream: its history, the caches of the four graphs, and the byte states and patch vectors
still in use.

Bookkeeping only: `graphs` runs the graphs. The history's buffers are as long as the capacity, so that positions a..b
are a view of them. Memory pages that no token has reached are never touched.

Letters: N byte capacity, P patch capacity, R rows, X cross-attention layers, D width, W patches that a byte
reads.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from ..backends.protocol import Array, Backend, Buffer, Call, Place
from ..bundle.spec import AHEAD, MARKS, RESIDENT, GraphSpec, ModelSpec
from ..errors import BackendError, CapacityError, OutOfMemory
from ..hashing import HashEmbedding, HashTables, NGrams, Tables, by_graph
from ..ids import EOS, NEWLINE, Ids
from ..patching import PatchState
from .caches import CacheTrack


class Graph:
    """One graph of a stream: its own caches, and calls bound to the stream's buffers."""

    def __init__(
        self, backend: Backend, spec: GraphSpec, crosses_documents: bool, caches: dict[str, Buffer] | None = None
    ) -> None:
        self.spec = spec
        self.track = CacheTrack(spec.cache, crosses_documents)
        self._backend = backend
        self._caches = caches or {}
        for output, source in spec.aliases.items() if caches is None else ():
            tensor = spec.tensor(source)
            buffer = backend.buffer(tensor.dtype, tensor.resolve(B=1), "device")
            self._caches[source] = self._caches[output] = buffer

    def new(self, tensor: str, place: Place = "host", **sizes: int) -> Buffer:
        """Memory for an input or output, letters replaced by sizes (B is 1)."""
        found = self.spec.tensor(tensor)
        if place == "step" and found in self.spec.outputs:
            place = "result"
        return self._backend.buffer(found.dtype, found.resolve(B=1, **sizes), place)

    def tensors(self) -> list[str]:
        """Its inputs and outputs but for the caches."""
        cached = {*self.spec.aliases, *self.spec.aliases.values()}
        return [t.name for t in (*self.spec.inputs, *self.spec.outputs) if t.name not in cached]

    def bind(self, **buffers: Buffer) -> Call:
        return self._backend.session(self.spec.name).bind({**buffers, **self._caches})

    def caches(self) -> dict[str, Buffer]:
        """Its caches by the names of the inputs."""
        return {source: self._caches[source] for source in self.spec.aliases.values()}


class StatePool:
    """Byte states [R, X, D] of the newest positions, in order: row r holds position base + r."""

    def __init__(self, encoder: Graph, rows: int) -> None:
        self._encoder = encoder
        self.base = 0
        self.buffer = self._new(rows)

    def _new(self, rows: int) -> Buffer:
        states_1SXD = self._encoder.new("byte_states", S=rows)
        return states_1SXD.part(0, states_1SXD.shape[1:])

    @property
    def rows(self) -> int:
        return self.buffer.shape[0]

    @property
    def state_bytes(self) -> int:
        return math.prod(self.buffer.shape[1:]) * self.buffer.dtype.itemsize

    def keep(self, start: int, states_SXD: Array) -> None:
        """Stores the states of the positions from `start` on, for which there is room."""
        self.buffer.array[start - self.base : start - self.base + len(states_SXD)] = states_SXD

    def begin(self, position: int) -> None:
        """Forgets the states before `position`, which is where the next one goes."""
        self.base = position

    def states(self, start: int, end: int) -> Array:
        """The states of positions start..end [S, X, D], a view."""
        states_SXD: Array = self.buffer.array[start - self.base : end - self.base]
        return states_SXD

    def reserve(self, position: int, end: int, keep: int) -> None:
        """Makes room up to `end`, dropping the states before `keep`. If the pool must grow, `buffer` is replaced."""
        if end - self.base <= self.rows:
            return
        kept = self.buffer.array[keep - self.base : position - self.base]
        rows = self.rows
        while end - keep > rows:
            rows *= 2
        target = self.buffer if rows == self.rows else self._new(rows)
        target.array[: len(kept)] = kept.copy()
        self.buffer, self.base = target, keep


class ResidentStates:
    """Byte states in memory of the graphs (`spec.resident_spec`): the encoder writes them, row p holds position p."""

    base = 0

    def __init__(self, encoder: Graph) -> None:
        self.buffer = encoder.caches()[RESIDENT["encoder"][0]]
        self.rows, width = self.buffer.shape[-2:]
        self.state_bytes = width * self.buffer.dtype.itemsize

    def reserve(self, position: int, end: int, keep: int) -> None:
        """There is room for the whole capacity."""

    def keep(self, start: int, states_SXD: Array) -> None:
        """The encoder has stored them."""

    def states(self, start: int, end: int) -> Array:
        raise BackendError("byte states are in memory of the graphs, which the host cannot see")

    def begin(self, position: int) -> None:
        """Rows do not move."""


class Mark(NamedTuple):
    """A patch boundary that a rollback can return to: tokens and patches before it, and the rule's state there."""

    position: int
    patches: int
    rule: PatchState


class Memory:
    """History and buffers of one stream. It has read `position` tokens and `patches` complete patches.

    caches, kv_ring: memory of a batch to use instead of new buffers: the caches by graph and tensor name, and
    the ring of the newest patch vectors. Raises MemoryError.
    """

    def __init__(
        self,
        spec: ModelSpec,
        backend: Backend,
        tables: HashTables | None,
        caches: Mapping[str, dict[str, Buffer]] | None = None,
        kv_ring: Buffer | None = None,
    ) -> None:
        if stream_bytes(spec) > sys.maxsize:
            raise MemoryError("more than the address space")
        self.spec, self.backend = spec, backend
        self.graphs = {
            name: Graph(backend, graph, spec.chunk_crosses_documents, caches[name] if caches else None)
            for name, graph in spec.graphs.items()
        }
        self._make_history(backend)
        self.hashes = _hash_embeddings(spec, by_graph(tables))
        self.pool: StatePool | ResidentStates
        if spec.resident:
            self.pool = ResidentStates(self.graphs["encoder"])
            kv_ring = self.graphs["latent"].caches()[RESIDENT["latent"][0]]
            self.kv_ring, self.kv_rows = kv_ring, kv_ring.shape[-2]
        else:
            self.pool = StatePool(self.graphs["encoder"], 2 * spec.chunk)
            if kv_ring is None:
                made = self.graphs["latent"].new("patch_kv", P=MARKS + AHEAD + spec.decoder_window)
                kv_ring = made.part(0, made.shape[1:])
            self.kv_ring, self.kv_rows = kv_ring, kv_ring.shape[0]
        self.clear()

    def _make_history(self, backend: Backend) -> None:
        spec = self.spec
        self.pad = max([max(hash.sizes) - 1 for hash in spec.hashes.values()], default=0)
        n, p = spec.capacity_bytes, spec.capacity_patches
        self.ids = backend.buffer("int64", (1, self.pad + n))
        self.positions = backend.buffer("int64", (1, max(n, p)))
        self.positions.array[0] = np.arange(max(n, p))
        self.documents = backend.buffer("int64", (1, n + 1))
        self.entropy_documents = self.documents
        if spec.patch_rule.reset_newlines:
            self.entropy_documents = backend.buffer("int64", (1, n + 1))
        self.entropies = backend.buffer("float32", (1, n))
        self.starts_P = np.zeros(p + 1, dtype=np.int64)
        self.patch_documents = backend.buffer("int64", (1, p + 1))

    def clear(self) -> None:
        """Empties the history and the caches. The buffers stay allocated."""
        self.position = self.patches = 0
        self.rule = PatchState(self.spec.patch_rule)
        self.marks: deque[Mark] = deque(maxlen=MARKS)
        self.pool.begin(0)
        self.entropies.array[...] = np.nan
        for graph in self.graphs.values():
            graph.track.clear()
        for buffer in (self.documents, self.entropy_documents, self.patch_documents):
            buffer.array[0, 0] = 0

    def history(self, buffer: Buffer, start: int, end: int) -> Buffer:
        """Positions start..end of a history buffer as one call's [1, S]."""
        return buffer.part(start + (self.pad if buffer is self.ids else 0), (1, end - start))

    @property
    def ids_N(self) -> Ids:
        return self.ids.array[0, self.pad : self.pad + self.position]

    def window(self, start: int, end: int, hash: HashEmbedding) -> Ids:
        """Ids of positions start..end with the predecessors that the n-grams of `hash` need."""
        return self.ids.array[0, start + self.pad - hash.history : end + self.pad]

    def check_room(self, tokens: int) -> None:
        """Raises CapacityError if `tokens` more do not fit. Patches count when they close (`check_patches`): the open
        one after the last patch of the capacity may still grow."""
        spec = self.spec
        if self.position + tokens > spec.capacity_bytes:
            raise CapacityError(
                f"{self.position + tokens:,} tokens exceed the capacity of {spec.capacity_bytes:,}: "
                "give a shorter text, or export with a larger --capacity"
            )

    def check_patches(self, patches: int) -> None:
        """Raises CapacityError if the latent transformer cannot hold that many patches."""
        if patches > self.spec.capacity_patches:
            raise CapacityError(
                f"the text needs more than the capacity of {self.spec.capacity_patches:,} patches: "
                "give a shorter text, or export with a larger --patches"
            )

    def keep_entropy(self) -> Callable[[], None]:
        """Copies the entropy model's caches, and returns the function that puts the copies back. The entropy model has
        to read a text before it is known whether its patches fit; a refused text must leave no trace."""
        caches = list(self.graphs["entropy"].caches().values())
        kept = [buffer.read() for buffer in caches]

        def put_back() -> None:
            for buffer, before in zip(caches, kept, strict=True):
                buffer.write(before)

        return put_back

    def place(self, ids_N: Ids, start: int | None = None) -> None:
        """Writes ids and their documents from `start` (default: `position`) on. `position` does not change."""
        start = self.position if start is None else start
        end = start + len(ids_N)
        self.ids.array[0, self.pad + start : self.pad + end] = ids_N
        _continue_documents(self.documents.array[0], start, ids_N == EOS)
        if self.entropy_documents is not self.documents:
            _continue_documents(self.entropy_documents.array[0], start, (ids_N == EOS) | (ids_N == NEWLINE))

    def advance(self, id: int, entropy: float) -> bool:
        """Counts the next token. If the patch rule ends the open patch there, the patch is complete, and the result is
        True. The caller then runs the latent transformer. Raises CapacityError if it is one patch too many."""
        closes = self.rule.closes(id, entropy)
        end = self.position + 1
        if closes:
            self.check_patches(self.patches + 1)
            self.close_patch(end)
            self.marks.append(Mark(end, self.patches, self.rule.copy()))
        self.position = end
        return closes

    def close_patch(self, end: int) -> None:
        """Closes the open patch before position `end`. The caller then runs the latent transformer."""
        patch = self.patches
        has_eos = self.documents.array[0, end] > self.starts_P[patch]
        masked = has_eos and self.spec.latent_document_mask
        documents_P = self.patch_documents.array[0]
        documents_P[patch + 1] = patch + 1 if masked else documents_P[patch]
        self.starts_P[patch + 1] = end
        self.patches = patch + 1

    def first_byte(self, patch: int) -> int:
        """The first position that patch `patch` reads: its own start, or that of an earlier one."""
        return int(self.starts_P[max(0, patch - self.spec.encoder_window + 1)])

    def roll_back(self, tokens: int, entropy_end: int | None = None) -> bool:
        """Rolls back to the newest boundary before `tokens` tokens. False if the caches do not allow it: replay then.

        entropy_end: end of the positions written to the entropy cache, if beyond `position`.
        """
        self.note_writes(entropy_end)
        while self.marks and self.marks[-1].position >= tokens:
            self.marks.pop()
        if not self.marks or not self._can_resume(self.marks[-1]):
            return False
        mark = self.marks[-1]
        self.position, self.patches, self.rule = mark.position, mark.patches, mark.rule.copy()
        if self.first_byte(self.patches) == self.position:
            self.pool.begin(self.position)
        return True

    def note_writes(self, entropy_end: int | None = None) -> None:
        """Records in the cache tracks how far the caches were written. Steps leave this out to save time."""
        ends = {"latent": self.patches, "entropy": entropy_end or self.position}
        for name, graph in self.graphs.items():
            end = ends.get(name, self.position)
            if end > 0:
                graph.track.wrote(end, int(self._documents_of(name)[end - 1]))

    def held(self) -> dict[str, int]:
        """Entries of the last token's document that each cache holds or has evicted, at least 1."""
        found = {}
        for name in self.graphs:
            end = self.patches if name == "latent" else self.position
            found[name] = max(1, end - int(self._documents_of(name)[end - 1])) if end else 1
        return found

    def _can_resume(self, mark: Mark) -> bool:
        first = self.first_byte(mark.patches)
        if first < self.pool.base and first != mark.position:
            return False
        ends = {"latent": mark.patches}
        return all(
            graph.track.can_resume(end, int(self._documents_of(name)[end]))
            for name, graph in self.graphs.items()
            for end in (ends.get(name, mark.position),)
        )

    def _documents_of(self, graph: str) -> Ids:
        by_graph = {"latent": self.patch_documents, "entropy": self.entropy_documents}
        documents_N: Ids = by_graph.get(graph, self.documents).array[0]
        return documents_N


def _hash_embeddings(spec: ModelSpec, tables: Mapping[str, Tables]) -> dict[str, HashEmbedding]:
    """By graph. Graphs whose n-grams are the same share their hashes, whatever the rows of their tables."""
    grams: dict[tuple[tuple[int, ...], int], NGrams] = {}
    found = {}
    for name, hash in spec.hashes.items():
        key = hash.sizes, hash.functions
        shared = grams.setdefault(key, NGrams(*key))
        found[name] = HashEmbedding(tables[name], *key, hash.rows, shared)
    return found


def _continue_documents(documents_N: Ids, start: int, ends_N: Array) -> None:
    """Sets doc_start of the tokens after `start`: a document begins after every True entry of ends."""
    after_N = np.where(ends_N, np.arange(start + 1, start + 1 + len(ends_N)), documents_N[start])
    documents_N[start + 1 : start + 1 + len(ends_N)] = np.maximum.accumulate(after_N)


def stream_bytes(spec: ModelSpec) -> int:
    """Bytes of a stream's caches and history, when all of it is in use."""
    history = 36 * spec.capacity_bytes + 16 * spec.capacity_patches
    return history + sum(graph.cache_bytes() for graph in spec.graphs.values())


def out_of_memory(spec: ModelSpec, error: MemoryError) -> OutOfMemory:
    """The OutOfMemory for a stream whose memory could not be allocated."""
    capacity = f"{spec.capacity_bytes:,} bytes and {spec.capacity_patches:,} patches"
    return OutOfMemory(
        f"not enough memory ({error}): a stream of {capacity} takes up to {stream_bytes(spec):,} bytes; "
        "export with a smaller --capacity, or keep fewer streams"
    )
