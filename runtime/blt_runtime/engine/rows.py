"""Batched calls: caches with one row per stream, and the tokens of any rows concatenated in one call.

A call reads segments, each a range of consecutive tokens of one row. `RowCalls` runs the batched graphs
(`spec.row_spec`), one call for all segments. `PaddedCalls` runs padded graphs (`spec.padded_spec`), whose calls have
the same number of tokens of every row. `LoopedCalls` runs the graphs of single streams, segment by segment. It is the
slow reference, and serves backends without batched graphs.

Results of `RowCalls` and `LoopedCalls` are batch-invariant, bit for bit. ONNX Runtime's kernels require two things for
that (measured in float32, 8 and 4 bits):

- The number of tokens is even. 8-bit products compute rows in pairs, and a last odd row by another kernel.
- A call of a byte graph holds single tokens or longer segments, not both. Attention with room for one token per row
  uses another kernel than with room for several, and is 2.5 times as fast after 400 bytes.

The latent graph, whose attention is small, always has room for two, and a prompt's patches run with those of other
rows.

Letters: T tokens of the call, Q rows, M most tokens of one row, L bytes of the longest patch, N byte states.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..backends.protocol import Array, Backend, Buffer, Call, PaddedBackend, Part, Place, RowBackend
from ..bundle.spec import DTYPE_BYTES, PADDED, RESIDENT, GraphSpec, ModelSpec, TensorSpec, padded_spec, row_spec
from ..errors import BackendError
from ..hashing import HashTables, Tables, by_graph
from .graphs import SHORTEST, entries
from .prefill import GATHER_BYTES

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
    Resident graphs have the byte states and patch vectors of all rows in one memory each, one row's after another's.
    The last row of each takes what a call's padding writes. Padded graphs have them per row, of fixed sizes.
    """

    def __init__(
        self, spec: ModelSpec, backend: Backend, rows: int, longest: int, hash_tables: HashTables | None = None
    ) -> None:
        self.rows, longest = rows, room(longest, "latent")
        self.resident, self.states, self.ring = spec.resident, spec.capacity_bytes + 1, longest + spec.decoder_window
        self.padded = isinstance(backend, PaddedBackend)
        if self.padded:
            self.states, self.ring = _memory_sizes(spec)
        elif self.resident and not isinstance(backend, RowBackend):
            raise BackendError("batched streams on a device need batched graphs: open the model with batched=True")
        self._caches: dict[str, dict[str, Buffer]] = {}
        for name, graph in spec.graphs.items():
            slots = spec.capacity_patches if name == "latent" else spec.capacity_bytes
            if graph.cache is not None and self.resident:  # a constant of the graphs
                slots = graph.cache.capacity
            elif graph.cache is not None and not isinstance(backend, RowBackend):
                slots = graph.cache.capacity - longest
            sizes = {"B": rows, "Q": rows, "C": slots + longest, "N": rows * self.states + 1, "R": rows * self.ring + 1}
            self._caches[name] = _row_caches(padded_spec(graph) if self.padded else row_spec(graph), backend, sizes)
        self.tables = _device_tables(backend, by_graph(hash_tables).get("encoder"))
        if self.resident:
            self.patch_kv = self._caches["latent"]["patch_kv"]
            return
        patch_kv = spec.graphs["latent"].tensor("patch_kv")
        self.patch_kv = backend.buffer(patch_kv.dtype, (rows * self.ring, *patch_kv.resolve(B=1, P=1)[2:]))

    def caches(self, group: str) -> dict[str, Buffer]:
        """[Q, heads, C, size] by the names of the graph's inputs and outputs."""
        return self._caches[group]

    def row_caches(self, group: str, row: int) -> dict[str, Buffer]:
        """The same of one row: [1, heads, C, size]. Of resident graphs also its byte states and patch vectors."""
        if self.resident:
            counts: dict[str, int] = {}  # entries of a row in memory of all rows, which padded graphs have by row
            if not self.padded:
                counts = dict.fromkeys(RESIDENT["encoder"], self.states) | dict.fromkeys(RESIDENT["latent"], self.ring)
            return {
                name: RowBuffer(buffer, row * counts.get(name, 1), counts.get(name, 1))
                for name, buffer in self._caches[group].items()
            }
        found: dict[str, Buffer] = {}
        for name, buffer in self._caches[group].items():
            size = math.prod(buffer.shape[1:])
            found[name] = buffer.part(row * size, (1, *buffer.shape[1:]))
        return found

    def memory(self, group: str) -> dict[str, Buffer]:
        """Inputs of a graph that are memory of all rows and belong to another graph."""
        if group == "decoder":
            states = {"byte_states": self._caches["encoder"]["byte_states"]} if self.resident else {}
            return {"patch_kv": self.patch_kv, **states}
        if group == "encoder" and self.tables is not None:
            return {"hash_tables": self.tables}
        return {"byte_states": self._caches["encoder"]["byte_states"]} if group == "latent" and self.resident else {}

    @property
    def padding(self) -> tuple[int, int]:
        """Rows of byte states and of patch vectors that no row of the batch uses."""
        return self.rows * self.states, self.rows * self.ring

    def state_rows(self, row: int, start: int, end: int) -> Array:
        """Rows of the byte states of positions start..end of a batch's row."""
        return np.arange(row * self.states + start, row * self.states + end)

    def patch_rows(self, row: int, patches: Array) -> Array:
        """Rows of the patch vectors of a batch's row; -1 for patches below 0."""
        rows: Array = np.where(patches >= 0, row * self.ring + patches % self.ring, -1)
        return rows

    def row_ring(self, row: int) -> Buffer | None:
        """The newest patch vectors of one row [ring, ...]; None if they are among its caches."""
        if self.resident:
            return None
        size = math.prod(self.patch_kv.shape[1:])
        return self.patch_kv.part(row * self.ring * size, (self.ring, *self.patch_kv.shape[1:]))


def _device_tables(backend: Backend, tables: Tables | None) -> Buffer | None:
    """The hash tables in memory of the device, if the encoder gathers from them there."""
    if not isinstance(backend, RowBackend) or not isinstance(tables, np.ndarray):
        return None
    spec = backend.row_session("encoder").spec
    if not spec.has_input("hash_tables"):
        return None
    tensor = spec.tensor("hash_tables")
    buffer = backend.buffer(tensor.dtype, tensor.resolve(), "device")
    buffer.write(tables)
    return buffer


class RowBuffer:
    """Entries first..first + count of a buffer along its first axis: one row of a batch, for copies."""

    def __init__(self, whole: Buffer, first: int, count: int) -> None:
        self.shape, self.dtype = (count, *whole.shape[1:]), whole.dtype
        self._whole, self._first = whole, first

    @property
    def array(self) -> Array:
        view: Array = self._whole.array[self._first : self._first + self.shape[0]]
        return view

    def part(self, start: int, shape: tuple[int, ...]) -> Buffer:
        raise BackendError("one row of a batch has no parts")

    def read(self, part: Part = ()) -> Array:
        return self._whole.read(self._of_whole(part))

    def write(self, array: Array, part: Part = ()) -> None:
        self._whole.write(array, self._of_whole(part))

    def _of_whole(self, part: Part) -> Part:
        first, *rest = part or (slice(None),)
        start, stop, _ = first.indices(self.shape[0])
        return (slice(self._first + start, self._first + stop), *rest)


def _row_caches(graph: GraphSpec, backend: Backend, sizes: Mapping[str, int]) -> dict[str, Buffer]:
    caches: dict[str, Buffer] = {}
    for output, source in graph.aliases.items():
        tensor = graph.tensor(source)
        caches[output] = caches[source] = backend.buffer(tensor.dtype, tensor.resolve(**sizes), "device")
    return caches


class Staging:
    """Inputs and outputs of one graph for up to T tokens: [1, T, ...] each. `memory` names inputs that are bound
    elsewhere. hash_tables: how many there are in memory of the device."""

    def __init__(
        self, graph: GraphSpec, backend: Backend, tokens: int, memory: Collection[str] = (), hash_tables: int = 0
    ) -> None:
        self.graph, self._backend = graph, backend
        self._sizes = {"B": 1, "S": tokens, "P": tokens, "N": 0}
        cached = {*graph.aliases, *graph.aliases.values(), *memory}
        if hash_tables:  # the graph gathers from tables on the device
            cached.add("hash_embedding")
        names = [t for t in (*graph.inputs, *graph.outputs) if t.name not in cached]
        self.buffers = {t.name: self._new(t.name) for t in names if not {"R", "L"} & set(t.shape)}
        if row_spec(graph).has_input("state_row"):
            self.buffers["state_row"] = backend.buffer("int64", (1, tokens), "step")
        if hash_tables:
            self.buffers["hash_rows"] = backend.buffer("int64", (1, tokens, hash_tables), "step")
        self._indexes: dict[int, Buffer] = {}

    def _new(self, name: str) -> Buffer:
        tensor = self.graph.tensor(name)
        return self._backend.buffer(tensor.dtype, tensor.resolve(**self._sizes), "step")

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
        return self.graph.name == "latent" and name == "byte_states"


class Calls(Protocol):
    """Runs one graph on its staging and the rows' caches."""

    def run(self, group: str, segments: Sequence[Segment]) -> None: ...

    def hold(self, row: int, lengths: Mapping[str, int], tokens: int = 0, patches: int = 0) -> None:
        """Sets how many entries of its document the row's caches hold, by graph, and how many tokens and patches the
        row has read. A graph without a length has none."""
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
            buffers |= self._arena.memory(group)
            self._backend.session(group).bind(buffers)()
            first += count

    def hold(self, row: int, lengths: Mapping[str, int], tokens: int = 0, patches: int = 0) -> None:
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

    def hold(self, row: int, lengths: Mapping[str, int], tokens: int = 0, patches: int = 0) -> None:
        for group, routes in self._routes.items():
            routes.hold(row, lengths.get(group, 1))

    def _bind(self, key: Key) -> Call:
        group, tokens, longest, _ = key
        buffers = self._staging[group].tokens(0, tokens) | self._arena.caches(group)
        buffers.pop("doc_start", None)
        buffers |= self._routes[group].buffers(tokens, longest) | self._arena.memory(group)
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


class PaddedCalls:
    """Segments in calls that have 1 or PADDED tokens of every row. Tokens that do not fit such a call run in calls of
    one: positions before the end of a ring, and patches with more than `padded_entries`. Rows match single streams
    within rounding: a token's products run beside those of other tokens."""

    def __init__(self, arena: Arena, backend: PaddedBackend, staging: dict[str, Staging]) -> None:
        self._graphs = {group: _PaddedGraph(arena, backend, found) for group, found in staging.items()}

    def run(self, group: str, segments: Sequence[Segment]) -> None:
        graph, todo, first = self._graphs[group], list[tuple[Segment, int]](), 0
        for segment in segments:
            todo.append((segment, first))
            first += segment.end - segment.start
        if first > len(todo):
            together = [one for one in todo if graph.fits(one[0].start)]
            graph.run(together)
            todo = [one for one in todo if not graph.fits(one[0].start)]
        while todo:
            graph.run([(segment._replace(end=segment.start + 1), first) for segment, first in todo])
            rest = [(segment._replace(start=segment.start + 1), first + 1) for segment, first in todo]
            todo = [one for one in rest if one[0].start < one[0].end]

    def hold(self, row: int, lengths: Mapping[str, int], tokens: int = 0, patches: int = 0) -> None:
        for group, graph in self._graphs.items():
            graph.hold(row, patches if group == "latent" else tokens)


class _PaddedGraph:
    """The calls of one padded graph, and where each row's next token goes."""

    def __init__(self, arena: Arena, backend: PaddedBackend, staging: Staging) -> None:
        self.spec, self._staging = padded_spec(staging.graph), staging
        self._arena, self._backend = arena, backend
        self._end_Q = np.zeros(arena.rows, dtype=np.int64)
        cache, latent = self.spec.cache, self.spec.name == "latent"
        self._cache_ring = cache.capacity if cache is not None and cache.kind == "ring" else None
        self._patch_ring = arena.ring if latent else None
        self._most_entries = padded_entries(self.spec, arena.rows) if latent else 0
        bound = {*arena.caches(self.spec.name), *arena.memory(self.spec.name)}
        self._inputs, self._outputs = (
            [tensor for tensor in tensors if tensor.name not in bound]
            for tensors in (self.spec.inputs, self.spec.outputs)
        )
        computed = {"positions", "doc_start", *(["patch_row"] if latent else [])}
        self._copied = [tensor.name for tensor in self._inputs if tensor.name not in computed]
        self._buffers: dict[int, dict[str, Buffer]] = {}
        self._bound: dict[tuple[int, int], tuple[dict[str, Buffer], Call]] = {}

    def hold(self, row: int, end: int) -> None:
        self._end_Q[row] = end

    def fits(self, start: int) -> bool:
        """Whether PADDED tokens from `start` on cross no end of a ring, and patches do not gather too much."""
        return self._longest() <= self._most_entries and all(
            start % ring + PADDED <= ring for ring in (self._cache_ring, self._patch_ring) if ring is not None
        )

    def run(self, todo: Sequence[tuple[Segment, int]]) -> None:
        """One call for segments of different rows, each with its first token in the staging."""
        if not todo:
            return
        row_S, start_S, end_S, document_S = np.array([segment for segment, _ in todo]).T
        n_S = end_S - start_S
        row_T = np.repeat(row_S, n_S)
        place_T = np.arange(len(row_T)) - np.repeat(np.cumsum(n_S) - n_S, n_S)
        token_T = np.repeat([first for _, first in todo], n_S) + place_T
        buffers, call = self._call(1 if n_S.max() == 1 else PADDED)
        self._place(buffers)
        buffers["doc_start"].array[row_T, place_T] = np.repeat(document_S, n_S)
        for name in self._copied:
            buffers[name].array[row_T, place_T] = self._staging[name][token_T]
        call()
        for tensor in self._outputs:
            self._staging[tensor.name][token_T] = buffers[tensor.name].array[row_T, place_T]
        self._end_Q[row_S] = end_S

    def _place(self, buffers: Mapping[str, Buffer]) -> None:
        """Every row's places from its end on, or from the end of the ring on if the call would cross it. As padding,
        each is a document of its own: a token that sees at least itself has finite results."""
        positions_QS = buffers["positions"].array
        place_S = np.arange(positions_QS.shape[1])
        positions_QS[...] = _within_ring(self._end_Q, len(place_S), self._cache_ring)[:, None] + place_S
        buffers["doc_start"].array[...] = positions_QS
        if self._patch_ring is None:
            return
        rows_Q = _within_ring(self._end_Q, len(place_S), self._patch_ring) % self._patch_ring
        buffers["patch_row"].array[...] = rows_Q[:, None] + place_S
        for name, value in (("byte_index", 0), ("patch_length", 1), ("own_start", 0)):
            if name in buffers:
                buffers[name].array.fill(value)

    def _call(self, size: int) -> tuple[dict[str, Buffer], Call]:
        """The call over `size` tokens of every row, and its buffers [Q, size, ...]. It is bound once."""
        longest = self._longest()
        if (size, longest) not in self._bound:
            if size not in self._buffers:
                self._buffers[size] = {
                    **{t.name: self._new(t, size, "step") for t in self._inputs if "L" not in t.shape},
                    **{t.name: self._new(t, size, "result") for t in self._outputs},
                }
            wide = {t.name: self._new(t, size, "step", longest) for t in self._inputs if "L" in t.shape}
            buffers = self._buffers[size] | wide
            name = self.spec.name
            bound = buffers | self._arena.caches(name) | self._arena.memory(name)
            self._bound[size, longest] = buffers, self._backend.padded_session(name).bind(bound)
        return self._bound[size, longest]

    def _longest(self) -> int:
        """Entries of a patch of the latent call; of other graphs 0."""
        index = self._staging.buffers.get("byte_index")
        return index.shape[-1] if self.spec.has_input("byte_index") and index is not None else 0

    def _new(self, tensor: TensorSpec, size: int, place: Place, longest: int = 0) -> Buffer:
        shape = tensor.resolve(B=self._arena.rows, S=size, P=size, L=longest)
        return self._backend.buffer(tensor.dtype, shape, place)


def _within_ring(end_Q: Array, size: int, ring: int | None) -> Array:
    """Where `size` places begin that cross no end of the ring: at each row's end, or where the ring begins next."""
    if ring is None:
        return end_Q
    crosses_Q = end_Q % ring + size > ring
    begins: Array = np.where(crosses_Q, (end_Q // ring + 1) * ring, end_Q)
    return begins


def _memory_sizes(spec: ModelSpec) -> tuple[int, int]:
    """Byte states and patch vectors that a stream of resident graphs has room for."""
    states, ring = (spec.graphs[name].tensor(RESIDENT[name][0]).resolve(B=1)[-2] for name in RESIDENT)
    return states, ring


def padded_entries(latent: GraphSpec, rows: int) -> int:
    """Most entries of a patch in a call with PADDED patches of every row, for which it gathers no more than
    GATHER_BYTES; at least SHORTEST. latent: the padded or resident graph."""
    memory = latent.tensor("byte_states")
    width = memory.shape[-1]
    assert isinstance(width, int)
    most = GATHER_BYTES // (rows * PADDED * width * DTYPE_BYTES[memory.dtype])
    return max(SHORTEST, 1 << (most.bit_length() - 1)) if most else SHORTEST


def padded_limits(spec: ModelSpec) -> tuple[int, int]:
    """Most bytes and patches of a stream in a padded row: after its last token there is room for padding, which may
    begin after the end of a ring. Raises BackendError for rings too short for that."""
    overhang = 2 * PADDED
    for name, graph in spec.graphs.items():
        if graph.cache is not None and graph.cache.kind == "ring" and graph.cache.longest_call < overhang:
            raise BackendError(f"graph {name!r}: batched streams on engines need an export with --chunk {overhang}")
    states, ring = _memory_sizes(spec)
    latent = spec.graphs["latent"].cache
    patches = latent.capacity if latent is not None and latent.kind == "linear" else spec.capacity_patches
    assert ring >= spec.decoder_window + overhang + PADDED, "it has room for MARKS and AHEAD patches more"
    if min(states - 1, patches) <= overhang:
        raise BackendError(f"batched streams on engines need an export with a --capacity above {overhang}")
    return states - 1 - overhang, patches - overhang
