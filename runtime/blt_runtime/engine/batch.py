"""Batched generation: which tokens of each row run next, and when the latent transformer runs.

A round has up to three calls. The entropy model and the encoder read a few tokens of every row that does not wait: one
sampled byte, or a slice of a prompt. If the policy allows it, the latent transformer runs over all patches that wait
for it. The decoder runs over all tokens whose patches are computed. A row with a complete patch waits while the others
advance, so the large weights are read once for several patches.

Results are batch-invariant, bit for bit (`rows` gives the reason): slices of a prompt are cut by its own positions, and
waiting changes when a row's patch runs, not what it computes.

Letters: T tokens of a call, S tokens of one row's, V vocabulary, W patches that a byte reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..arguments import is_whole
from ..backends.protocol import Array, Backend, PaddedBackend, RowBackend
from ..bundle.engines import check_streams
from ..bundle.spec import PADDED, ModelSpec
from ..errors import BltError, UsageError
from ..hashing import HashEmbedding, HashTables
from ..ids import Ids
from .caches import calls
from .graphs import LatentInputs
from .memory import Memory
from .prefill import GATHER_BYTES
from .rows import Arena, Calls, LoopedCalls, PaddedCalls, RowCalls, Segment, Staging, padded_limits
from .snapshot import Snapshot, put, take

SLICE = 8
"""Bytes of a prompt per round: few enough that a prompt delays rows that generate only a little."""
SHARE = 0.5


def gather(share: float = SHARE) -> Callable[[int, int], bool]:
    """The policy: run the latent transformer if at least this share of the rows waits, or no other row can advance."""

    def ready(waiting: int, going: int) -> bool:
        return going == 0 or waiting >= share * (waiting + going)

    return ready


@dataclass
class Counts:
    """Totals of a batch: rounds, latent calls, the patches in them, and tokens read."""

    rounds: int = 0
    latent_calls: int = 0
    patches: int = 0
    tokens: int = 0


class Row:
    """One stream of a batch. When all tokens up to `placed` are read, `logits_V` are the next-byte logits.

    on_logits: called for each segment with the ids that follow its tokens [S or S - 1] and its logits [S, V] (a view).
    The encoder has read positions up to `memory.position`, the decoder up to `decoded`. Patches up to `memory.patches`
    are complete. The latent transformer has run over those up to `stepped`.
    """

    def __init__(self, index: int, memory: Memory, vocab: int) -> None:
        self.index, self.memory = index, memory
        self.logits_V: Array = np.zeros(vocab, dtype=np.float32)
        self.error: BltError | None = None
        self.on_logits: Callable[[Ids, Array], None] | None = None
        self.begin()

    def begin(self) -> None:
        self.memory.clear()
        self.error, self.on_logits, self._prompt = None, None, True
        self.placed = self.decoded = self.stepped = self.turn = 0
        self.complete_S: Ids = np.empty(0, dtype=np.int64)

    def feed(self, ids_S: Ids, prompt: bool = True) -> None:
        """Appends ids to the tokens to read. prompt: False for generated ids, which no other row's prompt delays.
        Raises CapacityError (nothing changed) if they do not fit."""
        self.memory.check_room(self.placed - self.memory.position + len(ids_S))
        self.memory.place(ids_S, self.placed)
        self.placed += len(ids_S)
        self._prompt = prompt

    @property
    def encoded(self) -> Segment:
        """The tokens that the encoder has read and the decoder has not."""
        start = self.decoded
        return Segment(self.index, start, self.memory.position, int(self.memory.documents.array[0, start]))

    @property
    def reads(self) -> bool:
        """Whether the row reads a prompt: more than one token of it is left to read."""
        return self._prompt and self.placed - self.memory.position > 1

    @property
    def waits(self) -> bool:
        """Whether complete patches wait for the latent transformer."""
        return self.stepped < self.memory.patches

    @property
    def done(self) -> bool:
        """Whether all tokens were read: `logits_V` follow the last one."""
        return self.decoded == self.placed


class Batch:
    """Rows of one model and the rounds that advance them. Not thread-safe; `Scheduler` is.

    rows: streams at a time. slice: bytes of a prompt per round. ready: the policy (`gather`); its arguments are the
    rows that wait for the latent transformer and the rows that can advance without it. with_entropy: run the entropy
    model; by default if the patch rule needs it. Raises UsageError for rows or a slice below 1.
    """

    def __init__(
        self,
        spec: ModelSpec,
        backend: Backend,
        hash_tables: HashTables | None,
        rows: int,
        slice: int = SLICE,
        ready: Callable[[int, int], bool] | None = None,
        with_entropy: bool | None = None,
    ) -> None:
        if rows < 1 or slice < 1:
            raise UsageError("a batch needs at least 1 row, and slices of at least 1 byte")
        held = rows
        if isinstance(backend, PaddedBackend):
            spec, slice, held = with_padding(spec), min(slice, PADDED), backend.rows
            check_streams(rows, held)
        self.spec, self.slice = spec, min(slice, spec.chunk)
        self.counts, self._turn, self._owner = Counts(), 0, object()
        self._ready = ready or gather()
        tokens = rows * self.slice + rows * self.slice % 2
        self._arena = Arena(spec, backend, held, self.slice, hash_tables)
        gathered = {"encoder": spec.hash.tables} if spec.hash is not None and self._arena.tables is not None else {}
        self._staging = {
            name: Staging(graph, backend, tokens, self._arena.memory(name), gathered.get(name, 0))
            for name, graph in spec.graphs.items()
        }
        self._calls: Calls
        if isinstance(backend, RowBackend):
            self._calls = RowCalls(self._arena, backend, self._staging, tokens, self.slice)
        elif isinstance(backend, PaddedBackend):
            self._calls = PaddedCalls(self._arena, backend, self._staging)
        else:
            self._calls = LoopedCalls(self._arena, backend, self._staging)
        self.rows = [Row(i, self._memory(backend, hash_tables, i), spec.vocab_size) for i in range(rows)]
        self._free = list(reversed(self.rows))
        self._with_entropy = spec.patch_rule.needs_entropy if with_entropy is None else with_entropy

    def _memory(self, backend: Backend, hash_tables: HashTables | None, row: int) -> Memory:
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
        """Frees the row, also while it has tokens to read."""
        row.begin()
        self._calls.hold(row.index, {})
        self._free.append(row)

    def snapshot(self, row: Row) -> Snapshot:
        """The state of a row that has read all its tokens, for `restore` in rows of this batch. Raises UsageError."""
        if not row.done or not row.placed:
            raise UsageError("the row is empty or has tokens left to read: take the snapshot after they are read")
        return take(row.memory, self._owner, row.logits_V, 0)

    def check(self, snapshot: Snapshot) -> None:
        """Raises UsageError for a snapshot of another batch."""
        if not snapshot.is_of(self.spec, self._owner):
            raise UsageError("this snapshot was taken from another scheduler: take one from this scheduler")

    def restore(self, row: Row, snapshot: Snapshot) -> None:
        """Sets an empty row to the state of the snapshot, bit for bit."""
        put(snapshot, row.memory, row.logits_V)
        row.placed = row.decoded = snapshot.position
        row.stepped = snapshot.patches
        self._calls.hold(row.index, row.memory.held(), snapshot.position, snapshot.patches)

    @property
    def active(self) -> list[Row]:
        free = set(map(id, self._free))
        return [row for row in self.rows if id(row) not in free]

    def round(self) -> list[Row]:
        """Advances every row that has tokens to read. Returns the rows that have read all their tokens, and those that
        failed (`error`) because their text does not fit. Raises the backend's errors; no row is usable after one."""
        active = [row for row in self.active if row.error is None and not row.done]
        for rows in self._by_length([(row, self._next(row)) for row in self._chosen(active)]):
            self._encode(rows)
        waiting = [row for row in active if row.waits and row.error is None]
        free = [row for row in active if row.error is None and not row.waits]
        going = sum(not row.reads for row in free) + any(row.reads for row in free)
        if waiting and self._ready(len(waiting), going):
            self._step_latent(waiting)
        encoded = [row for row in active if not row.waits and row.decoded < row.memory.position]
        for rows in self._by_length([(row, row.encoded) for row in encoded]):
            self._decode(rows)
        self.counts.rounds += 1
        return [row for row in active if row.done or row.error is not None]

    def _chosen(self, active: list[Row]) -> list[Row]:
        """The rows that read tokens in this round. If any row generates, only the least recently read prompt is."""
        ready = [row for row in active if not row.waits and row.memory.position < row.placed]
        if all(row.reads for row in active):
            return ready
        self._turn += 1
        reader = min((row for row in ready if row.reads), key=lambda row: row.turn, default=None)
        if reader is not None:
            reader.turn = self._turn
        return [row for row in ready if row is reader or not row.reads]

    @staticmethod
    def _by_length(todo: list[tuple[Row, Segment]]) -> list[list[tuple[Row, Segment]]]:
        """Single tokens and longer segments in separate calls, as `rows` requires."""
        halves = [[one for one in todo if (one[1].end - one[1].start == 1) is single] for single in (True, False)]
        return [half for half in halves if half]

    def _encode(self, todo: list[tuple[Row, Segment]]) -> None:
        """Computes entropies, patch ends and byte states of the tokens."""
        if self._with_entropy:
            self._run_entropy(todo)
        fitting = [(row, segment) for row, segment in todo if self._close_patches(row, segment)]
        if not fitting:
            return
        staging = self._staging["encoder"]
        for row, start, end, part in _packed(fitting):
            staging["ids"][part] = row.memory.history(row.memory.ids, start, end).array[0]
            self._embed("encoder", row.memory, start, end, part)
        self._set_state_rows(staging, fitting)
        self._calls.run("encoder", [segment for _, segment in fitting])
        for row, start, end, part in _packed(fitting):
            if not self._arena.resident:
                row.memory.pool.keep(start, staging["byte_states"][part])
            self.counts.tokens += end - start

    def _embed(self, graph: str, memory: Memory, start: int, end: int, part: slice) -> None:
        """Hash embeddings of a row's tokens, or where the graph finds them on the device."""
        hash, staging = memory.hashes.get(graph), self._staging[graph]
        if hash is None:
            return
        window = memory.window(start, end, hash)
        on_device = graph == "encoder" and self._arena.tables is not None
        if end - start > 1:
            if on_device:
                staging["hash_rows"][part] = hash.locate_many(window)
            else:
                hash.many(window, staging["hash_embedding"][part])
            return
        known = graph == "encoder" and self._with_entropy and _hashed_by(memory.hashes.get("entropy"), hash)
        newest = None if known else window
        if on_device:
            staging["hash_rows"][part] = hash.locate(newest)
        else:
            hash.one(newest, staging["hash_embedding"][part.start])

    def _set_state_rows(self, staging: Staging, todo: list[tuple[Row, Segment]]) -> None:
        """Of resident graphs: where the byte states of the tokens are."""
        if self._arena.resident:
            for row, start, end, part in _packed(todo):
                staging["state_row"][part] = self._arena.state_rows(row.index, start, end)
            staging["state_row"][part.stop : part.stop + 1] = self._arena.padding[0]

    def _next(self, row: Row) -> Segment:
        """The next tokens of a row: up to the end of its slice or its document, or the limit of its caches."""
        memory, start = row.memory, row.memory.position
        end = min(row.placed, (start // self.slice + 1) * self.slice)
        for name, graph in memory.graphs.items():
            if name != "latent":
                documents = memory.entropy_documents if name == "entropy" else memory.documents
                _, end = next(calls(start, end, graph.spec.cache, self.slice, documents.array[0, start:end]))
        return Segment(row.index, start, end, int(memory.documents.array[0, start]))

    def _run_entropy(self, todo: list[tuple[Row, Segment]]) -> None:
        staging = self._staging["entropy"]
        for row, start, end, part in _packed(todo):
            staging["ids"][part] = row.memory.history(row.memory.ids, start, end).array[0]
            self._embed("entropy", row.memory, start, end, part)
        self._calls.run(
            "entropy", [s._replace(document=int(r.memory.entropy_documents.array[0, s.start])) for r, s in todo]
        )
        for row, start, end, part in _packed(todo):
            row.memory.entropies.array[0, start:end] = staging["entropy"][part]

    def _close_patches(self, row: Row, segment: Segment) -> bool:
        """Advances the row over the tokens and closes patches by the rule. False if they do not fit: `error` is set."""
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
        """One latent call over all patches that wait. There are several calls if a row's patches span documents, or if
        one call would gather more than GATHER_BYTES."""
        while rows:
            some = self._at_once(rows)
            segments = [self._next_patches(row) for row in some]
            self._place_patches(some, segments)
            self._calls.run("latent", segments)
            for row, start, end, part in _packed(zip(some, segments, strict=True)):
                if not self._arena.resident:
                    made = self._staging["latent"]["patch_kv"][part]
                    row.memory.kv_ring.array[np.arange(start, end) % self._arena.ring] = made
                row.stepped = end
                self.counts.patches += end - start
            self.counts.latent_calls += 1
            rows = [row for row in rows if row.waits]

    @staticmethod
    def _at_once(rows: list[Row]) -> list[Row]:
        """The first of `rows`, as many as gather up to GATHER_BYTES. Every patch is padded to the longest."""
        patches, longest = 0, 0
        for i, row in enumerate(rows):
            memory = row.memory
            patches += memory.patches - row.stepped
            longest = max(longest, memory.position - memory.first_byte(row.stepped))
            if i and patches * longest * memory.pool.state_bytes > GATHER_BYTES:
                return rows[:i]
        return rows

    def _next_patches(self, row: Row) -> Segment:
        memory, start = row.memory, row.stepped
        documents_P = memory.patch_documents.array[0, start : memory.patches]
        _, end = next(calls(start, memory.patches, memory.graphs["latent"].spec.cache, self.slice, documents_P))
        return Segment(row.index, start, end, int(documents_P[0]))

    def _place_patches(self, rows: list[Row], segments: list[Segment]) -> None:
        """Copies the patches' byte states into the staging, one patch after another, and sets each patch's indices.
        Resident graphs have the byte states, and are told where the patches' vectors go."""
        staging, arena = self._staging["latent"], self._arena
        patches = [(row, p) for row, s in zip(rows, segments, strict=True) for p in range(s.start, s.end)]
        firsts = [row.memory.first_byte(p) for row, p in patches]
        lengths = [int(row.memory.starts_P[p + 1]) - first for (row, p), first in zip(patches, firsts, strict=True)]
        count, index_PL = len(patches), staging.longest(max(lengths))
        own_P = staging["own_start"] if "own_start" in staging.buffers else None
        inputs = LatentInputs(index_PL, staging["patch_length"], own_P, arena.resident)
        rows_P = (
            self._copy_states(patches, firsts, lengths)
            if not arena.resident
            else [row.index * arena.states + first for (row, _), first in zip(patches, firsts, strict=True)]
        )
        for i, ((row, p), first, length) in enumerate(zip(patches, firsts, lengths, strict=True)):
            inputs.set(i, rows_P[i], length, int(row.memory.starts_P[p]) - first)
            if arena.resident:
                staging["patch_row"][i] = arena.patch_rows(row.index, np.array(p))
        if count < len(index_PL):  # padding to an even number of patches
            inputs.set(count, 0, 1, 0)
            if arena.resident:
                staging["patch_row"][count] = arena.padding[1]

    def _copy_states(self, patches: list[tuple[Row, int]], firsts: list[int], lengths: list[int]) -> list[int]:
        """Copies the patches' byte states into the staging. Returns the row where each patch begins."""
        states, at = self._staging["latent"].states(sum(lengths)), 0
        rows_P = []
        for (row, _), first, length in zip(patches, firsts, lengths, strict=True):
            states[at : at + length] = row.memory.pool.states(first, first + length)
            rows_P.append(at)
            at += length
        return rows_P

    def _decode(self, todo: list[tuple[Row, Segment]]) -> None:
        """The decoder over tokens whose patches are computed."""
        staging, width = self._staging["decoder"], self.spec.decoder_window
        self._set_state_rows(staging, todo)
        for row, start, end, part in _packed(todo):
            if not self._arena.resident:
                staging["byte_states"][part] = row.memory.pool.states(start, end)
            patch_SW = row.complete_S[:, None] - width + np.arange(width)
            staging["patch_row"][part] = self._arena.patch_rows(row.index, patch_SW)
        staging["patch_row"][part.stop : part.stop + 1] = -1
        self._calls.run("decoder", [segment for _, segment in todo])
        for row, start, end, part in _packed(todo):
            logits_SV = staging["logits"][part]
            if row.on_logits is not None:
                row.on_logits(
                    row.memory.ids.array[0, row.memory.pad + start + 1 : row.memory.pad + min(end + 1, row.placed)],
                    logits_SV,
                )
            row.logits_V[:] = logits_SV[-1]
            row.decoded = end


def _packed(todo: Iterable[tuple[Row, Segment]]) -> Iterator[tuple[Row, int, int, slice]]:
    """Row, start and end of each segment, and its slice of the staging, where segments are concatenated."""
    first = 0
    for row, (_, start, end, _) in todo:
        yield row, start, end, slice(first, first + end - start)
        first += end - start


def _hashed_by(before: HashEmbedding | None, hash: HashEmbedding) -> bool:
    """Whether the n-grams of a row's token were hashed when the entropy model read it, just before the encoder."""
    return before is not None and before.grams is hash.grams


def fitted(spec: ModelSpec, capacity: int | None) -> ModelSpec:
    """The spec with a smaller capacity. Raises UsageError for a larger one."""
    if capacity is None:
        return spec
    if not is_whole(capacity) or not 1 <= capacity <= spec.capacity_bytes:
        raise UsageError(f"capacity must be in 1..{spec.capacity_bytes}, which the bundle was exported for")
    capacity = int(capacity)
    patches = min(spec.capacity_patches, capacity)
    return replace(spec, capacity_bytes=capacity, capacity_patches=patches, chunk=min(spec.chunk, capacity))


def with_padding(spec: ModelSpec) -> ModelSpec:
    """The spec of streams on padded graphs: their memory has room for padding. Raises BackendError if there is none."""
    tokens, patches = padded_limits(spec)
    fitting = fitted(spec, min(tokens, spec.capacity_bytes))
    return replace(fitting, capacity_patches=min(patches, fitting.capacity_patches))
