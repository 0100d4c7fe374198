"""Taking in many tokens at once: the same four graphs as a step, on chunks.

First the entropy graph runs over all new tokens, so that the number of patches is known, and refused if it
does not fit, before anything else changes. Then chunk by chunk: encoder, the latent transformer over the
patches that finish in the chunk, decoder. Each graph's calls are cut where its own cache or documents ask
for it.

Letters: S tokens of a chunk, P patches that finish in it, L longest of them, W patches that a byte reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..backends.protocol import Array, Buffer
from ..errors import Cancelled
from ..ids import Ids
from ..patching import PatchState
from .caches import calls
from .memory import Graph, Mark, Memory

Cancel = Callable[[], bool]
"""Asked between chunks: shall the call stop here?"""
GATHER_BYTES = 16 << 20
"""Most bytes of byte states that one latent call gathers: its scratch memory grows with P * L."""


class Prefill:
    """Runs chunks on a stream's memory. Scratch buffers grow to the chunk and are kept."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._graphs = memory.graphs
        self._scratch: dict[tuple[str, str], Buffer] = {}

    def run(
        self,
        ids_N: Ids,
        closes_N: Array | None,
        with_entropy: bool,
        logits_NV: Array | None,
        cancelled: Cancel | None = None,
    ) -> Array:
        """Takes in ids [N]; returns the last logits [V]. `closes_N` overrides the patch rule; all logits go
        to `logits_NV`; `cancelled` is asked before every chunk.

        Raises CapacityError with the memory unchanged, except that only `Memory.go_back` knows the entropy
        cache's state; Cancelled with the memory somewhere between, from where `Memory.go_back` helps too.
        """
        memory = self._memory
        start, end = memory.position, memory.position + len(ids_N)
        memory.place(ids_N)
        if with_entropy:
            self._run_entropy(start, end, cancelled)
        rule, closes_N, marks = self._find_patches(ids_N, closes_N)
        memory.check_patches(memory.patches + int(closes_N.sum()))
        first, last_V = memory.patches, np.empty(0, dtype=np.float32)
        while memory.position < end:
            _ask(cancelled)
            a, chunk = memory.position, memory.spec.chunk
            b = min(end, (a // chunk + 1) * chunk)  # aligned, as the rings are: fewer cuts
            before = memory.patches
            logits_SV = self._chunk(a, b, closes_N[a - start : b - start])
            memory.marks.extend(marks[before - first : memory.patches - first])
            if logits_NV is not None:
                logits_NV[a - start : b - start] = logits_SV
            last_V = logits_SV[-1]
        memory.rule = rule
        return last_V

    def _find_patches(self, ids_N: Ids, forced_N: Array | None) -> tuple[PatchState, Array, list[Mark]]:
        """The rule's state behind the ids, where patches end, and the boundaries to come back to."""
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

    def _run_entropy(self, start: int, end: int, cancelled: Cancel | None = None) -> None:
        memory, graph = self._memory, self._graphs["entropy"]
        for a, b in self._calls(graph, start, end, memory.entropy_documents):
            _ask(cancelled)
            graph.bind(
                **self._clock(a, b, memory.entropy_documents),
                ids=memory.history(memory.ids, a, b),
                entropy=memory.history(memory.entropies, a, b),
                logits=self._buffer("entropy", "logits", b - a),
            )()

    def _chunk(self, a: int, b: int, closes_S: Array) -> Array:
        """Encoder, latent and decoder over positions a..b; their logits [S, V] (valid until the next chunk)."""
        memory = self._memory
        memory.pool.reserve(a, b, keep=memory.first_byte(memory.patches))
        self._run_encoder(a, b)
        before = memory.patches
        for t in np.flatnonzero(closes_S).tolist():
            memory.close_patch(a + t + 1)
        memory.position = b
        kv_RXKD = self._run_latent(before, memory.patches)
        complete_S = before + np.cumsum(closes_S)
        return self._run_decoder(a, b, kv_RXKD, complete_S, before)

    def _run_encoder(self, start: int, end: int) -> None:
        memory, graph = self._memory, self._graphs["encoder"]
        for a, b in self._calls(graph, start, end, memory.documents):
            extra = {}
            if memory.hash is not None:
                extra["hash_embedding"] = self._buffer("encoder", "hash_embedding", b - a)
                memory.hash.many(memory.window(a, b), extra["hash_embedding"].array[0])
            graph.bind(
                **self._clock(a, b, memory.documents),
                ids=memory.history(memory.ids, a, b),
                byte_states=memory.pool.rows_of(a, b),
                **extra,
            )()

    def _run_latent(self, first: int, end: int) -> Buffer:
        """Patch vectors of patches first..end behind those of the W patches before them."""
        memory, width = self._memory, self._memory.spec.decoder_window
        kv = self._buffer("latent", "patch_kv", width + end - first)
        kv = kv.part(0, kv.shape[1:])
        before_W = np.arange(first - width, first)
        kv.array[:width] = memory.kv_ring.array[before_W % memory.kv_rows]  # rows before patch 0 are never read
        for a, b in self._latent_calls(first, end):
            self._call_latent(a, b, kv.part((width + a - first) * kv.array[0].size, (1, b - a, *kv.shape[1:])))
        new_P = np.arange(max(first, end - memory.kv_rows), end)
        memory.kv_ring.array[new_P % memory.kv_rows] = kv.array[width + new_P - first]
        return kv

    def _latent_calls(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Cuts patches first..end so that no call gathers more than GATHER_BYTES."""
        memory = self._memory
        per_state = memory.pool.buffer.array[0].nbytes
        for start, stop in self._calls(self._graphs["latent"], first, end, memory.patch_documents):
            a, longest = start, 0
            for p in range(start, stop):
                longest = max(longest, int(memory.starts_P[p + 1]) - memory.first_byte(p))
                if p > a and longest * (p + 1 - a) * per_state > GATHER_BYTES:
                    yield a, p
                    a, longest = p, int(memory.starts_P[p + 1]) - memory.first_byte(p)
            yield a, stop

    def _call_latent(self, a: int, b: int, patch_kv: Buffer) -> None:
        memory, graph = self._memory, self._graphs["latent"]
        first_P = np.array([memory.first_byte(p) for p in range(a, b)])
        length_P = memory.starts_P[a + 1 : b + 1] - first_P
        sizes = {"P": b - a, "L": int(length_P.max())}
        index, length = graph.new("byte_index", **sizes), graph.new("patch_length", **sizes)
        entry_L = np.arange(sizes["L"])
        row_PL = (first_P - memory.pool.base)[:, None] + entry_L
        index.array[0] = np.where(entry_L < length_P[:, None], row_PL, 0)
        length.array[0] = length_P
        extra = {}
        if graph.spec.has_input("own_start"):
            extra["own_start"] = graph.new("own_start", **sizes)
            extra["own_start"].array[0] = memory.starts_P[a:b] - first_P
        graph.bind(
            byte_states=memory.pool.buffer,
            byte_index=index,
            patch_length=length,
            positions=memory.positions.part(a, (1, b - a)),
            doc_start=memory.patch_documents.part(a, (1, b - a)),
            patch_kv=patch_kv,
            **extra,
        )()

    def _run_decoder(self, start: int, end: int, kv: Buffer, complete_S: Ids, before: int) -> Array:
        memory, graph = self._memory, self._graphs["decoder"]
        width = memory.spec.decoder_window
        logits, row = self._buffer("decoder", "logits", end - start), graph.new("patch_row", S=end - start)
        patch_SW = complete_S[:, None] - width + np.arange(width)
        row.array[0] = np.where(patch_SW >= 0, patch_SW - before + width, -1)
        for a, b in self._calls(graph, start, end, memory.documents):
            graph.bind(
                **self._clock(a, b, memory.documents),
                byte_states=memory.pool.rows_of(a, b),
                patch_kv=kv,
                patch_row=row.part((a - start) * width, (1, b - a, width)),
                logits=logits.part((a - start) * logits.shape[-1], (1, b - a, logits.shape[-1])),
            )()
        logits_SV: Array = logits.array[0]
        return logits_SV

    def _calls(self, graph: Graph, start: int, end: int, documents: Buffer) -> Iterator[tuple[int, int]]:
        spec = self._memory.spec
        split = None if spec.chunk_crosses_documents else documents.array[0, start:end]
        return calls(start, end, graph.spec.cache, spec.chunk, split)

    def _clock(self, a: int, b: int, documents: Buffer) -> dict[str, Buffer]:
        memory = self._memory
        return {
            "positions": memory.history(memory.positions, a, b),
            "doc_start": memory.history(documents, a, b),
        }

    def _buffer(self, graph: str, tensor: str, tokens: int) -> Buffer:
        """Scratch for `tokens` rows of a tensor [1, S or P, ...], kept and grown."""
        kept = self._scratch.get((graph, tensor))
        if kept is None or kept.shape[1] < tokens:
            rows = max(tokens, min(self._memory.spec.chunk, 2 * tokens))
            kept = self._graphs[graph].new(tensor, S=rows, P=rows)
            self._scratch[graph, tensor] = kept
        return kept.part(0, (1, tokens, *kept.shape[2:]))


def _ask(cancelled: Cancel | None) -> None:
    if cancelled is not None and cancelled():
        raise Cancelled("cancelled while taking text in: the stream is as it was before")
