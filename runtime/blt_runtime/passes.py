"""Calls of the byte graphs over a few tokens at once, for `speculate`: what `prefill` does, but bound beforehand.

A call is bound for each number of tokens when it is first needed; all share the same buffers, and what differs from
pass to pass is written into them.

Letters: S tokens of a pass, V vocabulary, W patches that a byte reads.
"""

from __future__ import annotations

from typing import NamedTuple

from .backends.protocol import Array, Buffer, Call
from .memory import Memory
from .step import StepCalls


class Pass(NamedTuple):
    """Calls over S tokens; `entropy` is None in a model without."""

    entropy: Call | None
    encoder: Call
    decoder: Call


class PassCalls:
    """Calls over 2..`longest` tokens on buffers of their own, each bound when it is first needed and kept."""

    def __init__(self, memory: Memory, steps: StepCalls, longest: int) -> None:
        self._memory, self._steps, self.longest = memory, steps, longest
        self._bound: dict[int, Pass] = {}
        graphs = memory.graphs
        encoder, decoder = graphs["encoder"], graphs["decoder"]
        self._inputs = {n: encoder.new(n, S=longest) for n in ("ids", "positions", "doc_start")}
        self._states = encoder.new("byte_states", S=longest)
        self._hash = encoder.new("hash_embedding", S=longest) if memory.hash is not None else None
        self._patch_row = decoder.new("patch_row", S=longest)
        logits = decoder.new("logits", S=longest)
        self._logits, self.logits_SV = logits, logits.array[0]
        entropy = graphs.get("entropy")
        if entropy is not None:
            self._entropy = {n: entropy.new(n, S=longest) for n in ("doc_start", "entropy", "logits")}
            self.entropy_logits_SV: Array = self._entropy["logits"].array[0]

    def read(self, start: int, end: int) -> None:
        """The entropy model over positions start..end: entropies into the history, logits row by row."""
        memory, n = self._memory, end - start
        call = self._pass(n).entropy
        assert call is not None
        self._place(start, end)
        self._entropy["doc_start"].array[0, :n] = memory.entropy_documents.array[0, start]
        call()
        memory.entropies.array[0, start:end] = self._entropy["entropy"].array[0, :n]

    def encode(self, start: int, end: int) -> None:
        """The encoder over positions start..end, all of one document; their states into the pool."""
        memory, n = self._memory, end - start
        self._place(start, end)
        if self._hash is not None and memory.hash is not None:
            for s in range(n):
                memory.hash.one(memory.window(start + s, start + s + 1), self._hash.array[0, s])
        self._pass(n).encoder()
        pool = memory.pool
        pool.reserve(start, end, keep=memory.first_byte(memory.patches))
        pool.buffer.array[start - pool.base : end - pool.base] = self._states.array[0, :n]

    def decode(self, n: int) -> None:
        """The decoder over the n tokens just encoded, all reading the last finished patches."""
        self._patch_row.array[0, :n] = self._steps.patch_row_W
        self._pass(n).decoder()

    def _place(self, start: int, end: int) -> None:
        memory, n = self._memory, end - start
        self._inputs["ids"].array[0, :n] = memory.ids.array[0, memory.pad + start : memory.pad + end]
        self._inputs["positions"].array[0, :n] = memory.positions.array[0, start:end]
        self._inputs["doc_start"].array[0, :n] = memory.documents.array[0, start]

    def _pass(self, n: int) -> Pass:
        return self._bound.get(n) or self._bind(n)

    def _bind(self, n: int) -> Pass:
        graphs, entropy = self._memory.graphs, None
        ids, clock = _rows(self._inputs["ids"], n), {k: _rows(self._inputs[k], n) for k in ("positions", "doc_start")}
        states = _rows(self._states, n)
        if "entropy" in graphs:
            own = {k: _rows(buffer, n) for k, buffer in self._entropy.items()}
            entropy = graphs["entropy"].bind(ids=ids, positions=clock["positions"], **own)
        extra = {} if self._hash is None else {"hash_embedding": _rows(self._hash, n)}
        self._bound[n] = Pass(
            entropy,
            graphs["encoder"].bind(**clock, ids=ids, byte_states=states, **extra),
            graphs["decoder"].bind(
                **clock,
                byte_states=states,
                patch_kv=self._memory.kv_ring,
                patch_row=_rows(self._patch_row, n),
                logits=_rows(self._logits, n),
            ),
        )
        return self._bound[n]


def _rows(buffer: Buffer, n: int) -> Buffer:
    return buffer.part(0, (1, n, *buffer.shape[2:]))


def longest_pass(memory: Memory, guesses: int) -> int:
    """Tokens of the longest pass with that many guesses that all caches and the chunk allow."""
    caches = [graph.spec.cache for name, graph in memory.graphs.items() if name != "latent"]
    return max(1, min(1 + guesses, memory.spec.chunk, *(cache.longest_call for cache in caches if cache is not None)))
