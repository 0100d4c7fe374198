"""Many streams in step: which tokens run next, and when the latent transformer does.

A round is one call of the entropy model and the encoder over a few tokens of every row that can go on (one byte that
was chosen, or a slice of a prompt), then, if the policy says so, one latent call over all patches that wait for it,
then one decoder call over all tokens whose patches are there. A row whose patch has ended waits; the others go on. So
the large weights are read once for many patches.

What a row gets is the same alone and in any company, to the last bit (`rows` says why): slices of a prompt are cut by
its own positions, and waiting changes when a row's patch runs, not what it computes.

Letters: T tokens of a call, S tokens of one row's, V vocabulary, W patches that a byte reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..backends.protocol import Array, Backend, RowBackend
from ..bundle.spec import ModelSpec
from ..errors import BltError, UsageError
from ..hashing import Tables
from ..ids import Ids
from .caches import calls
from .graphs import LatentInputs
from .memory import Memory
from .prefill import GATHER_BYTES
from .rows import Arena, Calls, LoopedCalls, RowCalls, Segment, Staging
from .snapshot import Snapshot, put, take

SLICE = 8
"""Bytes of a prompt per round: few enough that rows which write are held up little."""
SHARE = 0.5


def gather(share: float = SHARE) -> Callable[[int, int], bool]:
    """The policy: patches run when they wait in at least this share of the rows, or in all that have tokens."""

    def ready(waiting: int, going: int) -> bool:
        return going == 0 or waiting >= share * (waiting + going)

    return ready


@dataclass
class Counts:
    """What a batch did: rounds, latent calls and the patches in them, tokens taken in."""

    rounds: int = 0
    latent_calls: int = 0
    patches: int = 0
    tokens: int = 0


class Row:
    """One text of a batch. `tokens` are to be taken in; when they are, `logits_V` says what comes next.

    Positions up to `memory.position` have gone through the encoder, up to `decoded` through the decoder. Patches up to
    `memory.patches` are finished, up to `stepped` the latent transformer has run.
    """

    def __init__(self, index: int, memory: Memory, vocab: int) -> None:
        self.index, self.memory = index, memory
        self.logits_V: Array = np.zeros(vocab, dtype=np.float32)
        self.error: BltError | None = None
        self.begin()

    def begin(self) -> None:
        self.memory.clear()
        self.error = None
        self.placed = self.decoded = self.stepped = self.turn = 0
        self.complete_S: Ids = np.empty(0, dtype=np.int64)

    def feed(self, ids_S: Ids) -> None:
        """Places ids behind what is there already. Raises CapacityError (nothing changed) if they do not fit."""
        self.memory.check_room(self.placed - self.memory.position + len(ids_S))
        self.memory.place(ids_S, self.placed)
        self.placed += len(ids_S)

    @property
    def encoded(self) -> Segment:
        """What the encoder has seen and the decoder has not."""
        start = self.decoded
        return Segment(self.index, start, self.memory.position, int(self.memory.documents.array[0, start]))

    @property
    def reads(self) -> bool:
        """A prompt, that is: it has more than one token to take in."""
        return self.placed - self.memory.position > 1

    @property
    def waits(self) -> bool:
        """For the latent transformer."""
        return self.stepped < self.memory.patches

    @property
    def done(self) -> bool:
        """All tokens were taken in: `logits_V` is new."""
        return self.decoded == self.placed


class Batch:
    """Rows of one model and the rounds that move them. Not for threads: `Scheduler` is.

    rows: texts at a time. slice: bytes of a prompt per round. ready: the policy (`gather`), told how many rows wait
    for the latent transformer and how many have tokens that could go on. with_entropy: run the entropy model (where the
    patch rule asks for it).
    """

    def __init__(
        self,
        spec: ModelSpec,
        backend: Backend,
        hash_tables: Tables | None,
        rows: int,
        slice: int = SLICE,
        ready: Callable[[int, int], bool] | None = None,
        with_entropy: bool | None = None,
    ) -> None:
        if rows < 1 or slice < 1:
            raise UsageError("a batch needs at least 1 row, and slices of at least 1 byte")
        self.spec, self.slice = spec, min(slice, spec.chunk)
        self.counts, self._turn, self._owner = Counts(), 0, object()
        self._ready = ready or gather()
        tokens = rows * self.slice + rows * self.slice % 2
        self._arena = Arena(spec, backend, rows, self.slice)
        self._staging = {name: Staging(graph, backend, tokens) for name, graph in spec.graphs.items()}
        self._calls: Calls
        if isinstance(backend, RowBackend):
            self._calls = RowCalls(self._arena, backend, self._staging, tokens, self.slice)
        else:
            self._calls = LoopedCalls(self._arena, backend, self._staging)
        self.rows = [Row(i, self._memory(backend, hash_tables, i), spec.vocab_size) for i in range(rows)]
        self._free = list(reversed(self.rows))
        self._with_entropy = spec.patch_rule.needs_entropy if with_entropy is None else with_entropy

    def _memory(self, backend: Backend, hash_tables: Tables | None, row: int) -> Memory:
        arena = self._arena
        caches = {group: arena.row_caches(group, row) for group in self.spec.graphs}
        return Memory(self.spec, backend, hash_tables, caches, arena.row_ring(row))

    def open(self) -> Row | None:
        """An empty row, if one is free."""
        if not self._free:
            return None
        row = self._free.pop()
        row.begin()
        return row

    def close(self, row: Row) -> None:
        """Gives the row back, whatever it was doing."""
        row.begin()
        self._calls.hold(row.index, {})
        self._free.append(row)

    def snapshot(self, row: Row) -> Snapshot:
        """The state of a row that is done with its tokens, for `restore` in other rows of this batch."""
        if not row.done or not row.placed:
            raise UsageError("the row has tokens to take in, or none at all: there is nothing to keep yet")
        return take(row.memory, self._owner, row.logits_V, 0)

    def check(self, snapshot: Snapshot) -> None:
        """Raises UsageError for a snapshot that was taken elsewhere."""
        if not snapshot.is_of(self.spec, self._owner):
            raise UsageError("this snapshot was taken elsewhere: take one from the same scheduler")

    def restore(self, row: Row, snapshot: Snapshot) -> None:
        """Makes an empty row what another one was, to the last bit."""
        put(snapshot, row.memory, row.logits_V)
        row.placed = row.decoded = snapshot.position
        row.stepped = snapshot.patches
        self._calls.hold(row.index, row.memory.held())

    @property
    def active(self) -> list[Row]:
        free = set(map(id, self._free))
        return [row for row in self.rows if id(row) not in free]

    def round(self) -> list[Row]:
        """Moves every row that has something to do; returns those that are done with their tokens, and those that
        failed (`error`): their text does not fit. Raises what the backend raises: then no row is usable."""
        active = [row for row in self.active if row.error is None and not row.done]
        for rows in self._apart([(row, self._next(row)) for row in self._chosen(active)]):
            self._encode(rows)
        waiting = [row for row in active if row.waits and row.error is None]
        free = [row for row in active if row.error is None and not row.waits]
        going = sum(not row.reads for row in free) + any(row.reads for row in free)
        if waiting and self._ready(len(waiting), going):
            self._step_latent(waiting)
        encoded = [row for row in active if not row.waits and row.decoded < row.memory.position]
        for rows in self._apart([(row, row.encoded) for row in encoded]):
            self._decode(rows)
        self.counts.rounds += 1
        return [row for row in active if row.done or row.error is not None]

    def _chosen(self, active: list[Row]) -> list[Row]:
        """The rows that take tokens in now. Where some write, the one that has read least lately reads."""
        ready = [row for row in active if not row.waits and row.memory.position < row.placed]
        if all(row.reads for row in active):
            return ready
        self._turn += 1
        reader = min((row for row in ready if row.reads), key=lambda row: row.turn, default=None)
        if reader is not None:
            reader.turn = self._turn
        return [row for row in ready if row is reader or not row.reads]

    @staticmethod
    def _apart(todo: list[tuple[Row, Segment]]) -> list[list[tuple[Row, Segment]]]:
        """Single tokens and longer segments apart, as `rows` asks for."""
        halves = [[one for one in todo if (one[1].end - one[1].start == 1) is single] for single in (True, False)]
        return [half for half in halves if half]

    def _encode(self, todo: list[tuple[Row, Segment]]) -> None:
        """Entropies, patch ends and byte states of the tokens."""
        if self._with_entropy:
            self._run_entropy(todo)
        fitting = [(row, segment) for row, segment in todo if self._close_patches(row, segment)]
        if not fitting:
            return
        staging = self._staging["encoder"]
        for row, start, end, part in _side_by_side(fitting):
            staging["ids"][part] = row.memory.history(row.memory.ids, start, end).array[0]
            if row.memory.hash is not None and end == start + 1:
                row.memory.hash.one(row.memory.window(start, end), staging["hash_embedding"][part.start])
            elif row.memory.hash is not None:
                row.memory.hash.many(row.memory.window(start, end), staging["hash_embedding"][part])
        self._calls.run("encoder", [segment for _, segment in fitting])
        for row, start, end, part in _side_by_side(fitting):
            row.memory.pool.rows_of(start, end).array[0] = staging["byte_states"][part]
            self.counts.tokens += end - start

    def _next(self, row: Row) -> Segment:
        """The next tokens of a row: up to the end of its slice, its document, or what its caches take at once."""
        memory, start = row.memory, row.memory.position
        end = min(row.placed, (start // self.slice + 1) * self.slice)
        for name, graph in memory.graphs.items():
            if name != "latent":
                documents = memory.entropy_documents if name == "entropy" else memory.documents
                _, end = next(calls(start, end, graph.spec.cache, self.slice, documents.array[0, start:end]))
        return Segment(row.index, start, end, int(memory.documents.array[0, start]))

    def _run_entropy(self, todo: list[tuple[Row, Segment]]) -> None:
        staging = self._staging["entropy"]
        for row, start, end, part in _side_by_side(todo):
            staging["ids"][part] = row.memory.history(row.memory.ids, start, end).array[0]
        self._calls.run(
            "entropy", [s._replace(document=int(r.memory.entropy_documents.array[0, s.start])) for r, s in todo]
        )
        for row, start, end, part in _side_by_side(todo):
            row.memory.entropies.array[0, start:end] = staging["entropy"][part]

    def _close_patches(self, row: Row, segment: Segment) -> bool:
        """Moves the row over the tokens, closing patches as the rule says; False if it failed, as they do not fit."""
        memory, _, start, end = row.memory, *segment[:3]
        memory.pool.reserve(start, end, keep=memory.first_byte(memory.patches))
        ids = memory.history(memory.ids, start, end).array[0].tolist()
        entropies = memory.entropies.array[0, start:end].tolist()
        complete = []
        try:
            for id, entropy in zip(ids, entropies, strict=True):
                memory.advance(id, entropy)
                complete.append(memory.patches)
        except BltError as error:
            row.error = error
            return False
        row.complete_S = np.array(complete)
        return True

    def _step_latent(self, rows: list[Row]) -> None:
        """One call over all patches that wait; several, where a document of patches ends among a row's, or where all
        together would gather too much."""
        while rows:
            some = self._at_once(rows)
            segments = [self._next_patches(row) for row in some]
            self._place_patches(some, segments)
            self._calls.run("latent", segments)
            made, ring = self._staging["latent"]["patch_kv"], self._arena.ring
            for row, start, end, part in _side_by_side(zip(some, segments, strict=True)):
                row.memory.kv_ring.array[np.arange(start, end) % ring] = made[part]
                row.stepped = end
                self.counts.patches += end - start
            self.counts.latent_calls += 1
            rows = [row for row in rows if row.waits]

    @staticmethod
    def _at_once(rows: list[Row]) -> list[Row]:
        """The first of `rows`, as many as gather up to GATHER_BYTES: every patch takes the room of the longest."""
        patches, longest = 0, 0
        for i, row in enumerate(rows):
            memory = row.memory
            patches += memory.patches - row.stepped
            longest = max(longest, memory.position - memory.first_byte(row.stepped))
            if i and patches * longest * memory.pool.buffer.array[0].nbytes > GATHER_BYTES:
                return rows[:i]
        return rows

    def _next_patches(self, row: Row) -> Segment:
        memory, start = row.memory, row.stepped
        documents_P = memory.patch_documents.array[0, start : memory.patches]
        split = None if self.spec.chunk_crosses_documents else documents_P
        _, end = next(calls(start, memory.patches, memory.graphs["latent"].spec.cache, self.slice, split))
        return Segment(row.index, start, end, int(documents_P[0]))

    def _place_patches(self, rows: list[Row], segments: list[Segment]) -> None:
        """Byte states of the patches, one patch behind the other, and where each finds its own."""
        staging = self._staging["latent"]
        patches = [(row.memory, p) for row, s in zip(rows, segments, strict=True) for p in range(s.start, s.end)]
        firsts = [memory.first_byte(p) for memory, p in patches]
        lengths = [int(memory.starts_P[p + 1]) - first for (memory, p), first in zip(patches, firsts, strict=True)]
        count, at = len(patches), 0
        states, index_PL = staging.states(sum(lengths)), staging.longest(max(lengths))
        own_P = staging["own_start"] if "own_start" in staging.buffers else None
        inputs = LatentInputs(index_PL, staging["patch_length"], own_P)
        for i, ((memory, p), first, length) in enumerate(zip(patches, firsts, lengths, strict=True)):
            inputs.set(i, at, length, int(memory.starts_P[p]) - first)
            row = first - memory.pool.base
            states[at : at + length] = memory.pool.buffer.array[row : row + length]
            at += length
        if count < len(index_PL):  # the patch that makes their number even
            inputs.set(count, 0, 1, 0)

    def _decode(self, todo: list[tuple[Row, Segment]]) -> None:
        """The decoder over tokens whose patches are there."""
        staging, ring, width = self._staging["decoder"], self._arena.ring, self.spec.decoder_window
        for row, start, end, part in _side_by_side(todo):
            staging["byte_states"][part] = row.memory.pool.rows_of(start, end).array[0]
            patch_SW = row.complete_S[:, None] - width + np.arange(width)
            staging["patch_row"][part] = np.where(patch_SW >= 0, row.index * ring + patch_SW % ring, -1)
        staging["patch_row"][part.stop : part.stop + 1] = -1
        self._calls.run("decoder", [segment for _, segment in todo])
        for row, _, end, part in _side_by_side(todo):
            row.logits_V[:] = staging["logits"][part.stop - 1]
            row.decoded = end


def _side_by_side(todo: Iterable[tuple[Row, Segment]]) -> Iterator[tuple[Row, int, int, slice]]:
    """Row, start and end of each segment, and where its tokens lie in the staging: one segment behind the other."""
    first = 0
    for row, (_, start, end, _) in todo:
        yield row, start, end, slice(first, first + end - start)
        first += end - start


def fitted(spec: ModelSpec, capacity: int | None) -> ModelSpec:
    """The spec with a smaller capacity. Raises UsageError for a larger one."""
    if capacity is None:
        return spec
    if not 1 <= capacity <= spec.capacity_bytes:
        raise UsageError(f"capacity must lie in 1..{spec.capacity_bytes}, which the bundle was exported for")
    patches = min(spec.capacity_patches, capacity)
    return replace(spec, capacity_bytes=capacity, capacity_patches=patches, chunk=min(spec.chunk, capacity))
