"""A decode step: one token through the graphs, with calls that are bound once.

`Graphs` does the same for any number of tokens. This form stores single numbers instead of copying arrays, so that a
step allocates nothing.

On a device that composes calls, the step forks. The entropy model only tells whether the token closes its patch, so the
encoder and the decoder run beside it, and the decoder reads the last patch complete before the token. Usually that is
right, and one wait is enough. If the token closes its patch, the latent transformer and the decoder run: the second
run of the decoder overwrites what the first wrote at this position, so the results are those of the plain order.
"""

from __future__ import annotations

from ..backends.protocol import Array, Call, ComposingBackend
from ..hashing import HashEmbedding
from ..ids import EOS, NEWLINE
from .graphs import Graphs
from .memory import Memory


class StepCalls:
    """The bound calls of a step over a stream's memory: `entropy`, `encoder`, `decoder`. `read` runs them for one
    token, and runs the latent transformer when a patch is complete."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._with_entropy = memory.spec.patch_rule.needs_entropy
        self._capacity_patches = memory.spec.capacity_patches
        self._graphs = graphs = Graphs(memory, 1, kept=True)
        self._id, self._position, self._document = graphs.ids_S, graphs.position_S, graphs.document_S
        self._states_1XD, self._patch_row_W = graphs.states_SXD, graphs.patch_row_SW[0]
        self.logits_V: Array = graphs.logits_SV[0]
        self._entropy_document = self._document
        self.encoder, self.decoder = graphs.call("encoder", 1), graphs.call("decoder", 1)
        if "entropy" in memory.graphs:
            self.entropy = graphs.call("entropy", 1)
            self._entropy_document, self._entropy_value = graphs.entropy_document_S, graphs.entropy_S
        self._hashes = self._hash_calls()
        self._fork = _Fork(self, memory, graphs) if _Fork.is_exact(memory) else None

    def read(self, id: int) -> None:
        """Reads one token and computes everything that the next byte depends on. Raises CapacityError (nothing
        changed)."""
        memory = self._memory
        memory.check_room(1)
        if memory.patches == self._capacity_patches:
            self._check_last_patch(id)
        t = memory.position
        self.set_token(id, t)
        self._embed(t)
        if self._fork is not None:
            return self._fork.read(id, t)
        entropy = 0.0
        if self._with_entropy:
            self.entropy()
            entropy = self.keep_entropy(t)
        self.encoder()
        self._keep_state(t)
        if memory.advance(id, entropy):
            self._graphs.latent(memory.patches - 1, memory.patches)
            self.read_patches()
        self.decoder()

    def _hash_calls(self) -> list[tuple[HashEmbedding, Array, bool]]:
        """The hash embeddings that a step needs, where each goes, and whether one before it hashes the same n-grams."""
        found: list[tuple[HashEmbedding, Array, bool]] = []
        for name, hash in self._memory.hashes.items():
            if name != "entropy" or self._with_entropy:
                known = any(other.grams is hash.grams for other, _, _ in found)
                found.append((hash, self._graphs.hash_SD[name][0], known))
        return found

    def _embed(self, t: int) -> None:
        """The hash embeddings of the token at position t."""
        window = self._memory.window
        for hash, out_D, known in self._hashes:
            hash.one(None if known else window(t, t + 1, hash), out_D)

    def keep_entropy(self, t: int) -> float:
        """Stores the entropy that the entropy model computed at position t."""
        entropy: float = self._entropy_value.item()
        self._memory.entropies.array[0, t] = entropy
        return entropy

    def _check_last_patch(self, id: int) -> None:
        """The capacity in patches is used up: raises CapacityError if the token would close the open patch."""
        memory, entropy = self._memory, 0.0
        if self._with_entropy:
            put_back = memory.keep_entropy()
            self.set_token(id, memory.position)
            self._embed(memory.position)
            self.entropy()
            entropy = self._entropy_value.item()
            put_back()
        if memory.rule.copy().closes(id, entropy):
            memory.check_patches(memory.patches + 1)

    def set_token(self, id: int, t: int) -> None:
        """Places id at position t: sets the one-token inputs, the history, and the documents of position t + 1."""
        memory = self._memory
        document = memory.documents.array[0, t]
        memory.ids.array[0, memory.pad + t] = id
        self._id[0], self._position[0], self._document[0] = id, t, document
        memory.documents.array[0, t + 1] = t + 1 if id == EOS else document
        if memory.entropy_documents is memory.documents:
            self._entropy_document[0] = document
            return
        entropy_documents_N = memory.entropy_documents.array[0]
        self._entropy_document[0] = entropy_documents_N[t]
        entropy_documents_N[t + 1] = t + 1 if id in (EOS, NEWLINE) else entropy_documents_N[t]

    def _keep_state(self, t: int) -> None:
        """Copies the newest byte state into the pool, at position t, unless the encoder stored it."""
        if self._states_1XD is None:
            return
        pool = self._memory.pool
        if t - pool.base >= pool.rows:
            pool.reserve(t, t + 1, keep=self._memory.first_byte(self._memory.patches))
        pool.buffer.array[t - pool.base] = self._states_1XD[0]

    def read_patches(self) -> None:
        """Points the decoder at the last W complete patches."""
        memory, rows_W = self._memory, self._patch_row_W
        width = len(rows_W)
        for w in range(width):
            patch = memory.patches - width + w
            rows_W[w] = patch % memory.kv_rows if patch >= 0 else -1


class _Fork:
    """The forked step over composed calls: one for a token, and one for a patch of each size."""

    def __init__(self, steps: StepCalls, memory: Memory, graphs: Graphs) -> None:
        assert isinstance(memory.backend, ComposingBackend)
        self._steps, self._memory, self._graphs, self._compose = steps, memory, graphs, memory.backend.compose
        self._token = self._compose([[steps.entropy], [steps.encoder, steps.decoder]])
        self._patches: dict[Call, Call] = {}

    @staticmethod
    def is_exact(memory: Memory) -> bool:
        """Whether the backend composes calls, boundaries depend on entropies, and a position can be written twice:
        not in a cache that evicts, and only where the encoder passes its states to the decoder without the host."""
        spec = memory.spec
        evicts = any(graph.cache is not None and graph.cache.kind == "window" for graph in spec.graphs.values())
        known = isinstance(memory.backend, ComposingBackend) and spec.patch_rule.needs_entropy
        return known and spec.resident and not evicts

    def read(self, id: int, t: int) -> None:
        """The rest of `StepCalls.read` after the inputs of the token are set."""
        memory = self._memory
        self._token()
        if memory.advance(id, self._steps.keep_entropy(t)):
            latent = self._graphs.latent_call(memory.patches - 1, memory.patches)
            self._steps.read_patches()
            call = self._patches.get(latent)
            if call is None:
                call = self._patches[latent] = self._compose([[latent, self._steps.decoder]])
            call()
