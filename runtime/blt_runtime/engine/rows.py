"""Batched calls: caches with one row per stream, and the tokens of any rows concatenated in one call.

A call reads segments, each a range of consecutive tokens of one row. `RowCalls` runs the batched graphs
(`spec.row_spec`), one call for all segments. `LoopedCalls` runs the graphs of single streams, segment by segment. It is
the slow reference, and serves backends without batched graphs.

Results are batch-invariant, bit for bit. ONNX Runtime's kernels require two things for that (measured in float32, 8 and
4 bits):

- The number of tokens is even. 8-bit products compute rows in pairs, and a last odd row by another kernel.
- A call of a byte graph holds single tokens or longer segments, not both. Attention with room for one token per row
  uses another kernel than with room for several, and is 2.5 times as fast after 400 bytes.

The latent graph, whose attention is small, always has room for two, and a prompt's patches run with those of other
rows.

Letters: T tokens of the call, Q rows, M most tokens of one row, L bytes of the longest patch, N byte states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..backends.protocol import Array, Backend, Buffer, Call, RowBackend
from ..bundle.spec import GraphSpec, ModelSpec, row_spec
from .graphs import entries

Key = tuple[str, int, int, tuple[int, ...]]
"""Graph, tokens, room per row, and sizes of other buffers: what a bound call depends on."""


class Segment(NamedTuple):
    """Tokens start..end (bytes, or patches in the latent graph) of one row, in the document that starts at
    `document`."""

    row: int
    start: int
    end: int
    document: int


class Arena:
    """Caches and patch vectors of Q rows. `spec` holds the capacities of one row, `longest` the most tokens of one
    row in a call.

    Batched graphs accept any number of slots. They need as many unused ones as a call has room for tokens of a row.
    """

    def __init__(self, spec: ModelSpec, backend: Backend, rows: int, longest: int) -> None:
        self.rows, longest = rows, room(longest, "latent")
        self._caches: dict[str, dict[str, Buffer]] = {}
        for name, graph in spec.graphs.items():
            slots = spec.capacity_patches if name == "latent" else spec.capacity_bytes
            if not isinstance(backend, RowBackend) and graph.cache is not None:
                slots = graph.cache.capacity - longest
            self._caches[name] = _row_caches(graph, backend, rows, slots + longest)
        patch_kv = spec.graphs["latent"].tensor("patch_kv")
        self.ring = longest + spec.decoder_window
        self.patch_kv = backend.buffer(patch_kv.dtype, (rows * self.ring, *patch_kv.resolve(B=1, P=1)[2:]))

    def caches(self, group: str) -> dict[str, Buffer]:
        """[Q, heads, C, size] by the names of the graph's inputs and outputs."""
        return self._caches[group]

    def row_caches(self, group: str, row: int) -> dict[str, Buffer]:
        """The same of one row: [1, heads, C, size]."""
        found = {}
        for name, buffer in self._caches[group].items():
            size = math.prod(buffer.shape[1:])
            found[name] = buffer.part(row * size, (1, *buffer.shape[1:]))
        return found

    def row_ring(self, row: int) -> Buffer:
        """The newest patch vectors of one row [ring, ...]."""
        size = math.prod(self.patch_kv.shape[1:])
        return self.patch_kv.part(row * self.ring * size, (self.ring, *self.patch_kv.shape[1:]))


def _row_caches(graph: GraphSpec, backend: Backend, rows: int, slots: int) -> dict[str, Buffer]:
    caches: dict[str, Buffer] = {}
    for output, source in row_spec(graph).aliases.items():
        tensor = row_spec(graph).tensor(source)
        caches[output] = caches[source] = backend.buffer(tensor.dtype, tensor.resolve(Q=rows, C=slots), "device")
    return caches


class Staging:
    """Inputs and outputs of one graph for up to T tokens: [1, T, ...] each."""

    def __init__(self, graph: GraphSpec, backend: Backend, tokens: int) -> None:
        self.graph, self._backend = graph, backend
        self._sizes = {"B": 1, "S": tokens, "P": tokens, "N": 0}
        cached = {*graph.aliases, *graph.aliases.values()}
        names = [t for t in (*graph.inputs, *graph.outputs) if t.name not in cached]
        self.buffers = {t.name: self._new(t.name) for t in names if not {"R", "L"} & set(t.shape)}
        self._indexes: dict[int, Buffer] = {}

    def _new(self, name: str) -> Buffer:
        tensor = self.graph.tensor(name)
        return self._backend.buffer(tensor.dtype, tensor.resolve(**self._sizes))

    def __getitem__(self, name: str) -> Array:
        """[T, ...] of an input or output; byte states of the latent graph [N, ...]."""
        array: Array = self.buffers[name].array
        return array if self._is_pool(name) else array[0]

    def longest(self, size: int) -> Array:
        """Room for patches of up to `size` bytes: byte_index [T, L]."""
        length = self._sizes["L"] = entries(size)
        if length not in self._indexes:
            self._indexes[length] = self._new("byte_index")
        self.buffers["byte_index"] = self._indexes[length]
        return self["byte_index"]

    def states(self, count: int) -> Array:
        """Room for `count` byte states [N, ...]."""
        if self.buffers["byte_states"].shape[0] < count:
            self._sizes["N"] = 2 * count
            self.buffers["byte_states"] = self._new("byte_states")
        return self["byte_states"]

    def tokens(self, first: int, count: int) -> dict[str, Buffer]:
        """Buffers of `count` tokens from the `first` on."""
        return {
            name: buffer
            if self._is_pool(name)
            else buffer.part(first * buffer.array[0, 0].size, (1, count, *buffer.shape[2:]))
            for name, buffer in self.buffers.items()
        }

    def _is_pool(self, name: str) -> bool:
        return self.graph.tensor(name).shape[0] == "N"


class Calls(Protocol):
    """Runs one graph on its staging and the rows' caches."""

    def run(self, group: str, segments: Sequence[Segment]) -> None: ...

    def hold(self, row: int, lengths: Mapping[str, int]) -> None:
        """Sets how many entries of its document the row's caches hold, by graph. A graph without a length has none."""
        ...


class LoopedCalls:
    """Segment by segment on the graphs of single streams."""

    def __init__(self, arena: Arena, backend: Backend, staging: dict[str, Staging]) -> None:
        self._arena, self._backend, self._staging = arena, backend, staging

    def run(self, group: str, segments: Sequence[Segment]) -> None:
        staging, first = self._staging[group], 0
        for row, start, end, document in segments:
            count = end - start
            staging["positions"][first : first + count] = np.arange(start, end)
            staging["doc_start"][first : first + count] = document
            buffers = staging.tokens(first, count) | self._arena.row_caches(group, row)
            if group == "decoder":
                buffers["patch_kv"] = self._arena.patch_kv
            self._backend.session(group).bind(buffers)()
            first += count

    def hold(self, row: int, lengths: Mapping[str, int]) -> None:
        """Does nothing: each call's inputs describe its row completely."""


class RowCalls:
    """All segments in one call, on the batched graphs. A call is bound when its size is first needed, and kept."""

    def __init__(
        self, arena: Arena, backend: RowBackend, staging: dict[str, Staging], tokens: int, longest: int
    ) -> None:
        self._arena, self._backend, self._staging = arena, backend, staging
        self._routes = {group: _Routes(group, backend, arena.rows, tokens, longest) for group in staging}
        self._bound: dict[Key, Call] = {}

    def run(self, group: str, segments: Sequence[Segment]) -> None:
        staging, routes = self._staging[group], self._routes[group]
        n_S = np.array([s.end - s.start for s in segments])
        count = int(n_S.sum())
        routes.set(segments, n_S, staging["positions"])
        key = (group, count + count % 2, room(int(n_S.max()), group), _sizes(staging))
        call = self._bound.get(key) or self._bind(key)
        call()

    def hold(self, row: int, lengths: Mapping[str, int]) -> None:
        for group, routes in self._routes.items():
            routes.hold(row, lengths.get(group, 1))

    def _bind(self, key: Key) -> Call:
        group, tokens, longest, _ = key
        buffers = self._staging[group].tokens(0, tokens) | self._arena.caches(group)
        buffers.pop("doc_start", None)
        buffers |= self._routes[group].buffers(tokens, longest)
        if group == "decoder":
            buffers["patch_kv"] = self._arena.patch_kv
        self._bound[key] = self._backend.row_session(group).bind(buffers)
        return self._bound[key]


def room(tokens: int, group: str) -> int:
    """Tokens of one row that a call has room for: 1, 2, 4, 8, ..."""
    return max(2 if group == "latent" else 1, 1 << (tokens - 1).bit_length())


def _sizes(staging: Staging) -> tuple[int, ...]:
    """Sizes that also determine a call's buffers: room for the longest patch, and for byte states, which only grows."""
    found = [staging.buffers.get(name) for name in ("byte_index", "byte_states")]
    return tuple(buffer.shape[at] for buffer, at in zip(found, (-1, 0), strict=True) if buffer is not None)


class _Routes:
    """Which row each token belongs to, as the graphs' inputs slots, back, lengths and counts."""

    def __init__(self, group: str, backend: Backend, rows: int, tokens: int, longest: int) -> None:
        self._group = group
        sizes = {1 << k for k in range(room(longest, group).bit_length())}
        self._slots = {size: backend.buffer("int64", (rows, size, 2)) for size in sizes}
        self._back = backend.buffer("int64", (1, tokens, 2))
        self._lengths, self._counts = (backend.buffer("int64", (rows,)) for _ in range(2))
        self._lengths.array[:] = 1

    def set(self, segments: Sequence[Segment], n_S: Array, positions_T: Array) -> None:
        row_S, start_S, end_S, document_S = np.array(segments).T
        first_S = np.cumsum(n_S) - n_S
        token_T = np.arange(int(n_S.sum()))
        row_T, place_T = np.repeat(row_S, n_S), token_T - np.repeat(first_S, n_S)
        positions_T[: len(token_T)] = np.repeat(start_S, n_S) + place_T
        slots = self._slots[room(int(n_S.max()), self._group)].array
        slots.fill(0)
        slots[row_T, place_T, 1] = token_T
        back_T = self._back.array[0]
        back_T[: len(token_T), 0], back_T[: len(token_T), 1] = row_T, place_T
        back_T[len(token_T) : len(token_T) + 1] = 0  # padding to an even number of tokens
        self._counts.array.fill(0)
        self._counts.array[row_S] = n_S
        self._lengths.array[row_S] = end_S - document_S

    def hold(self, row: int, length: int) -> None:
        """Sets the row's cache length until a call includes the row. An empty cache counts as 1."""
        self._lengths.array[row] = length

    def buffers(self, tokens: int, longest: int) -> dict[str, Buffer]:
        return {
            "slots": self._slots[longest],
            "back": self._back.part(0, (1, tokens, 2)),
            "lengths": self._lengths,
            "counts": self._counts,
        }
