"""Prefill: many tokens at once, with the same four graphs as a step, in chunks.

First the entropy graph runs over all new tokens. That gives the number of patches. If they do not fit, the entropy
model's caches are put back, and nothing has changed. Then each chunk runs through the encoder, the latent transformer
(over the patches that the chunk completes) and the decoder. Each graph's calls are cut where its own cache or documents
require it.

Letters: S tokens of a chunk, P patches that it completes, L bytes of the longest, W patches that a byte reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np

from ..backends.protocol import Array, Buffer
from ..errors import Cancelled, CapacityError
from ..ids import Ids
from ..patching import PatchState
from .caches import calls
from .graphs import Graphs, PatchRows
from .memory import Mark, Memory

Cancel = Callable[[], bool]
"""Called before every chunk. Returns True if the call must stop there."""
GATHER_BYTES = 16 << 20
"""Most bytes of byte states that one latent call gathers: its scratch memory grows with P * L."""


class Prefill:
    """Runs chunks on a stream's memory. Staging buffers are allocated for the first chunk and kept."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    @cached_property
    def _graphs(self) -> Graphs:
        return Graphs(self._memory, self._memory.spec.chunk, kept=False)

    @cached_property
    def _patch_rows(self) -> Buffer:
        """Vectors of the W patches before a chunk, then those of the chunk."""
        memory = self._memory
        rows = memory.graphs["latent"].new("patch_kv", P=memory.spec.decoder_window + memory.spec.chunk)
        return rows.part(0, rows.shape[1:])

    def run(
        self,
        ids_N: Ids,
        *,
        with_entropy: bool,
        closes_N: Array | None = None,
        logits_NV: Array | None = None,
        cancelled: Cancel | None = None,
    ) -> Array:
        """Reads ids [N] and returns the last logits [V].

        with_entropy: run the entropy model. closes_N: replaces the patch rule. logits_NV: receives all logits.
        cancelled: called before every chunk.

        Raises CapacityError with the memory unchanged, and Cancelled with only some of the ids read:
        `Memory.roll_back` then restores a consistent state.
        """
        memory = self._memory
        start, end = memory.position, memory.position + len(ids_N)
        memory.place(ids_N)
        may_be_refused = memory.patches + len(ids_N) > memory.spec.capacity_patches
        put_back = memory.keep_entropy() if with_entropy and may_be_refused else None
        if with_entropy:
            self.run_entropy(start, end, cancelled)
        rule, closes_N, marks = self._find_patches(ids_N, closes_N)
        try:
            memory.check_patches(memory.patches + int(closes_N.sum()))
        except CapacityError:
            if put_back is not None:
                put_back()
            raise
        first = memory.patches
        chunk_SV = np.empty((min(memory.spec.chunk, end - start), memory.spec.vocab_size), dtype=np.float32)
        while memory.position < end:
            _check_cancelled(cancelled)
            a, chunk = memory.position, memory.spec.chunk
            b = min(end, (a // chunk + 1) * chunk)  # aligned, as the rings are: fewer cuts
            before = memory.patches
            logits_SV = chunk_SV[: b - a] if logits_NV is None else logits_NV[a - start : b - start]
            self._chunk(a, b, closes_N[a - start : b - start], logits_SV)
            memory.marks.extend(marks[before - first : memory.patches - first])
        memory.rule = rule
        last_V: Array = logits_SV[-1]
        return last_V

    def _find_patches(self, ids_N: Ids, forced_N: Array | None) -> tuple[PatchState, Array, list[Mark]]:
        """The rule's state after the ids, where patches end, and the boundaries that a rollback can return to."""
        memory = self._memory
        rule, patches, marks = memory.rule.copy(), memory.patches, []
        closes_N = np.zeros(len(ids_N), dtype=np.bool_)
        entropies_N = memory.entropies.array[0, memory.position : memory.position + len(ids_N)].tolist()
        for t, (id, entropy) in enumerate(zip(ids_N.tolist(), entropies_N, strict=True)):
            closes = rule.closes(id, entropy)
            if closes if forced_N is None else forced_N[t]:
                closes_N[t] = True
                patches += 1
                marks.append(Mark(memory.position + t + 1, patches, rule.copy()))
        return rule, closes_N, marks

    def run_entropy(self, start: int, end: int, cancelled: Cancel | None = None) -> None:
        """Fills `Memory.entropies` at the positions start..end, whose ids are placed. Raises Cancelled."""
        for a, b in self._calls("entropy", start, end, self._memory.entropy_documents):
            _check_cancelled(cancelled)
            self._graphs.entropy(a, b)

    def _chunk(self, a: int, b: int, closes_S: Array, logits_SV: Array) -> None:
        """Encoder, latent transformer and decoder over positions a..b. Their logits go into logits_SV."""
        memory, documents = self._memory, self._memory.documents
        memory.pool.reserve(a, b, keep=memory.first_byte(memory.patches))
        for start, end in self._calls("encoder", a, b, documents):
            self._graphs.encode(start, end)
        before = memory.patches
        for t in np.flatnonzero(closes_S).tolist():
            memory.close_patch(a + t + 1)
        memory.position = b
        patches = self._run_latent(before, memory.patches)
        complete_S = before + np.cumsum(closes_S)
        for start, end in self._calls("decoder", a, b, documents):
            logits_SV[start - a : end - a] = self._graphs.decode(start, end, complete_S[start - a : end - a], patches)

    def _run_latent(self, first: int, end: int) -> PatchRows | None:
        """Vectors of patches first..end, after those of the W patches before them. None: all are in the ring."""
        memory, width = self._memory, self._memory.spec.decoder_window
        if memory.spec.resident:
            for a, b in self._latent_calls(first, end):
                self._graphs.latent(a, b)
            return None
        rows = self._patch_rows.part(0, (width + end - first, *self._patch_rows.shape[1:]))
        before_W = np.arange(first - width, first)
        rows.array[:width] = memory.kv_ring.array[before_W % memory.kv_rows]  # no graph reads rows before patch 0
        patches = PatchRows(rows, first - width)
        for a, b in self._latent_calls(first, end):
            self._graphs.latent(a, b, patches)
        new_P = np.arange(max(first, end - memory.kv_rows), end)
        memory.kv_ring.array[new_P % memory.kv_rows] = rows.array[width + new_P - first]
        return patches

    def _latent_calls(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Cuts patches first..end so that no call gathers more than GATHER_BYTES."""
        memory = self._memory
        per_state = memory.pool.state_bytes
        for start, stop in self._calls("latent", first, end, memory.patch_documents):
            a, longest = start, 0
            for p in range(start, stop):
                longest = max(longest, int(memory.starts_P[p + 1]) - memory.first_byte(p))
                if p > a and longest * (p + 1 - a) * per_state > GATHER_BYTES:
                    yield a, p
                    a, longest = p, int(memory.starts_P[p + 1]) - memory.first_byte(p)
            yield a, stop

    def _calls(self, graph: str, start: int, end: int, documents: Buffer) -> Iterator[tuple[int, int]]:
        spec = self._memory.spec
        split = None if spec.chunk_crosses_documents else documents.array[0, start:end]
        return calls(start, end, spec.graphs[graph].cache, spec.chunk, split)


def _check_cancelled(cancelled: Cancel | None) -> None:
    if cancelled is not None and cancelled():
        raise Cancelled("cancelled while reading text: the stream is as it was before")
