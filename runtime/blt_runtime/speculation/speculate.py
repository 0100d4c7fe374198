"""Speculative decoding: several bytes from one pass of the decoder, and the same bytes as without it.

A round reads one chosen byte together with drafts of the bytes after it, boundaries among them. The entropy model reads
them all, and the patch rule finds the boundaries. One encoder call runs over them, one latent call over the patches
that would close, and one decoder call in which each byte reads its own last complete patch. Then the drafts wait: for
each next byte, the sampler chooses from the target's own logits. If the choice equals the next draft, the draft is
accepted, and only the counters move. Otherwise the drafts are dropped and a new round begins. So the stream never shows
a byte that the sampler did not choose, and its state is always that of plain decoding. Only caches, and rows after the
last counted position and patch, have been written further.

Why dropping is exact: all memory is addressed by position or by patch. No round writes further than every cache can
roll back (`CacheTrack.room`), than the ring of patch vectors has spare rows (`AHEAD`), or into another document.

Where the decoder drafts, its steps before the first boundary are what the pass would compute: only the positions from
there on run again.

Rounding: a pass over S bytes and S passes over one differ by about 1e-6 in the logits. Where the target's two most
likely ids are closer than that, greedy output may choose the other one, as it may after a prefill.

Letters: S tokens of a pass (the chosen one and S - 1 drafts), V vocabulary, W patches that a byte reads.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..backends.protocol import Array
from ..bundle.spec import AHEAD
from ..engine.graphs import Graphs, longest_pass
from ..engine.memory import Memory
from ..engine.step import StepCalls
from ..errors import UsageError
from ..ids import Ids
from ..sampling import Sampler
from .adaptive import AdaptiveDrafter, Costs
from .drafters import DecoderDrafter, Drafter, EntropyDrafter, FirstOf, LookupDrafter

Speculate = Literal["off", "auto", "decoder", "entropy", "lookup", "lookup+decoder"]


@dataclass
class SpeculationStats:
    """Counts of a stream's speculative decoding since the stream was made.

    tokens: generated with it, in `passes` rounds. drafts: verified, of which `accepted` were accepted. *_calls: of
    each graph, those for drafting included.

    Example:
        list(stream.generate(200, speculate="auto"))
        print(stream.speculation.tokens_per_pass, stream.speculation.acceptance_rate)
    """

    tokens: int = 0
    passes: int = 0
    drafts: int = 0
    accepted: int = 0
    entropy_calls: int = 0
    encoder_calls: int = 0
    latent_calls: int = 0
    decoder_calls: int = 0

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / max(1, self.passes)

    @property
    def acceptance_rate(self) -> float:
        """Accepted drafts per verified draft; 0 if there were none."""
        return self.accepted / max(1, self.drafts)

    @property
    def guesses(self) -> int:
        """The former name of `drafts`."""
        warnings.warn("SpeculationStats.guesses is now drafts", DeprecationWarning, stacklevel=2)
        return self.drafts

    @property
    def right(self) -> int:
        """The former name of `accepted`."""
        warnings.warn("SpeculationStats.right is now accepted", DeprecationWarning, stacklevel=2)
        return self.accepted


class Speculation:
    """One speculative generation: `choose` an id, `read` it, and repeat.

    A round has run all graphs over positions `_start` to `_end`; those from the stream's position on hold drafts.
    """

    def __init__(self, of: Speculator, calls: Graphs, drafter: Drafter, sampler: Sampler) -> None:
        self._memory, self._steps, self._stats, self._costs = of.memory, of.steps, of.stats, of.costs
        self._calls, self._drafter, self._sampler = calls, drafter, sampler
        self._with_entropy = of.memory.spec.patch_rule.needs_entropy
        self._graphs = [
            graph
            for name, graph in of.memory.graphs.items()
            if name in ("encoder", "decoder") or (name == "entropy" and self._with_entropy)
        ]
        self._logits_SV = np.empty((calls.longest, of.memory.spec.vocab_size), dtype=np.float32)
        self._drawn_from: dict[int, Array] = {}
        self.drop()

    def drop(self) -> None:
        """Drops all drafts: another call has used the stream."""
        self._start = self._end = 0
        self._drawn_from.clear()

    def choose(self) -> int:
        """The next id, distributed as the sampler's choice from the stream's logits. It equals that choice unless the
        draft was drawn from a distribution."""
        logits_V, t = self._steps.logits_V, self._memory.position
        q_V = self._drawn_from.get(t) if t < self._end else None
        return self._sampler(logits_V) if q_V is None else self._sampler.verify(logits_V, self._token_at(t), q_V)

    def read(self, id: int) -> None:
        """Reads the chosen id: an accepted draft is only counted, any other id begins a round."""
        memory, t = self._memory, self._memory.position
        memory.check_room(1)
        accepted = t < self._end and self._token_at(t) == id
        if t < self._end:
            self._drafter.settle(t, accepted)
        if accepted:
            self._accept(id, t)
        else:
            self._drawn_from.clear()
            self._round(id, t)
        self._stats.tokens += 1

    def _token_at(self, t: int) -> int:
        return int(self._memory.ids.array[0, self._memory.pad + t])

    def _ids_before(self, t: int) -> Ids:
        ids_N: Ids = self._memory.ids.array[0, self._memory.pad : self._memory.pad + t]
        return ids_N

    def _accept(self, id: int, t: int) -> None:
        self._stats.accepted += 1
        self._steps.logits_V[:] = self._logits_SV[t - self._start]
        if self._advance(id, t):
            self._steps.read_patches()

    def _advance(self, id: int, t: int) -> bool:
        """Counts one more token, and its patch if the token closes it."""
        closes = self._memory.advance(id, self._entropy_at(t))
        self._costs.boundary_rate.note(closes)
        return closes

    def _entropy_at(self, t: int) -> float:
        return self._memory.entropies.array[0, t].item() if self._with_entropy else 0.0

    def _round(self, id: int, t: int) -> None:
        """Reads `id` as a plain step does, and drafts of the ids after it in the same calls."""
        self._start = self._end = t
        if self._memory.patches == self._memory.spec.capacity_patches:
            return self._step(id)  # refuses a token that closes one patch more
        self._steps.set_token(id, t)
        limit = max(0, self._draft_limit(t))
        proposed = self._drafter.propose(self._ids_before(t + 1), limit)
        if not proposed and self._drafter.source is None and self._costs.measured:
            return self._step(id)
        end = t + 1
        for draft in proposed:
            if end - t > limit or not self._continues_document(end):
                break
            self._steps.set_token(draft, end)
            end += 1
        read = decoded = t
        if self._drafter.source == "entropy" and self._with_entropy:
            read = end = self._draft_with_entropy(t, end, limit)
        elif self._drafter.source == "decoder" and not proposed:
            end, decoded = self._draft_with_decoder(t, limit)
        return self._verify(id, t, end, read, decoded)

    def _step(self, id: int) -> None:
        """A round without drafts: a plain step, which is a little cheaper than a pass over one token."""
        stats, patches, began = self._stats, self._memory.patches, time.perf_counter()
        self._steps.read(id)
        closed = self._memory.patches > patches
        self._costs.note_step(closed, time.perf_counter() - began)
        stats.passes += 1
        stats.entropy_calls += self._with_entropy
        stats.encoder_calls += 1
        stats.latent_calls += closed
        stats.decoder_calls += 1

    def _verify(self, id: int, t: int, end: int, read: int, decoded: int) -> None:
        """Runs the graphs over the rest of positions t..end, after which the drafts can be accepted. The entropy model
        has read up to `read`, the encoder and the decoder have run up to `decoded`."""
        memory, calls, before = self._memory, self._calls, self._memory.patches
        if decoded < end:
            self._encode(decoded, end)
        if self._with_entropy and read < end:
            self._read(read, end)
        complete_S = self._close_patches(id, t, end)
        end = t + len(complete_S)
        if complete_S[-1] > before:
            calls.latent(before, complete_S[-1])
            memory.graphs["latent"].track.reached(complete_S[-1])
            self._stats.latent_calls += 1
        self._steps.read_patches()
        again = min(decoded, t + complete_S.count(before))  # from the first boundary on, bytes read other patches
        if again < end:
            self._decode(again, end, np.array(complete_S[again - t :]))
        self._steps.logits_V[:] = self._logits_SV[0]
        self._end = end
        self._stats.passes += 1
        self._stats.drafts += end - t - 1

    def _close_patches(self, id: int, t: int, end: int) -> list[int]:
        """Counts the chosen token, and finds the patches that close up to `end`, or up to the first one too many.
        Returns the number of complete patches after each token [S]."""
        memory = self._memory
        first = memory.patches
        self._advance(id, t)
        counted, rule = memory.patches, memory.rule.copy()
        room, complete = self._patch_room(first, counted), [counted]
        for s in range(t + 1, end):
            closes = rule.closes(self._token_at(s), self._entropy_at(s))
            if closes and memory.patches - counted == room:
                break
            if closes:
                memory.close_patch(s + 1)
                if self._begins_document(memory.patches):
                    room = memory.patches - counted
            complete.append(memory.patches)
        memory.patches = counted
        return complete

    def _patch_room(self, first: int, patches: int) -> int:
        """How many patches may close after the `patches` that are counted, in one latent call from `first` on, so that
        every cache can roll back all of them."""
        memory, track = self._memory, self._memory.graphs["latent"].track
        if patches > first and self._begins_document(patches):
            return 0
        room = min(AHEAD, memory.spec.capacity_patches - patches)
        room = min(room, track.room(patches, int(memory.patch_documents.array[0, patches])))
        if track.spec is not None:
            room = min(room, first + track.spec.longest_call - patches)
            if track.spec.kind == "ring":
                room = min(room, first + track.spec.capacity - first % track.spec.capacity - patches)
        return room

    def _begins_document(self, patch: int) -> bool:
        return bool(self._memory.patch_documents.array[0, patch] == patch)

    def _draft_limit(self, t: int) -> int:
        """How many drafts may follow position t, so that every cache can roll back all of them.

        Nor may a call cross the end of a ring, or of a document.
        """
        memory, spec = self._memory, self._memory.spec
        if not self._continues_document(t + 1):
            return 0
        limit = min(self._calls.longest - 1, spec.capacity_bytes - t - 1)
        for graph in self._graphs:
            documents = memory.entropy_documents if graph.spec.name == "entropy" else memory.documents
            limit = min(limit, graph.track.room(t + 1, int(documents.array[0, t + 1])))
            cache = graph.spec.cache
            if cache is not None and cache.kind == "ring":
                limit = min(limit, cache.capacity - 1 - t % cache.capacity)
        return limit

    def _draft_with_entropy(self, t: int, end: int, limit: int) -> int:
        """Drafts from position `end` on by the entropy model, which reads all of them. Returns their end."""
        read = t
        while True:
            logits_V = self._read(read, end)[-1]
            read = end
            if not self._draft(end, limit - (end - t - 1), logits_V):
                return end
            end += 1

    def _draft_with_decoder(self, t: int, limit: int) -> tuple[int, int]:
        """Drafts after position t by the decoder, as if no patch closed. Returns their end, and how far the decoder has
        run. It must be able to roll back to t."""
        end, complete = t + 1, np.array([self._memory.patches])
        limit = min(limit, self._memory.graphs["decoder"].track.room(t, int(self._memory.documents.array[0, t])))
        while end - t <= limit:
            self._encode(end - 1, end)
            self._decode(end - 1, end, complete)
            if not self._draft(end, limit - (end - t - 1), self._logits_SV[end - 1 - t]):
                return end, end
            end += 1
        return end, end - 1

    def _draft(self, t: int, limit: int, logits_V: Array) -> bool:
        """Adds one draft, at position t, if the drafter has one and t begins no document."""
        if limit < 1 or not self._continues_document(t):
            return False
        draft = self._drafter.extend(self._ids_before(t), logits_V)
        if draft is None:
            return False
        id, q_V = draft
        if q_V is not None:
            self._drawn_from[t] = q_V
        self._steps.set_token(id, t)
        return True

    def _continues_document(self, t: int) -> bool:
        """Whether position t is not the first of a document."""
        memory = self._memory
        return bool(memory.documents.array[0, t] < t and memory.entropy_documents.array[0, t] < t)

    def _read(self, start: int, end: int) -> Array:
        logits_SV = self._calls.entropy(start, end)
        self._memory.graphs["entropy"].track.reached(end)
        self._stats.entropy_calls += 1
        return logits_SV

    def _encode(self, start: int, end: int) -> None:
        self._calls.encode(start, end)
        self._memory.graphs["encoder"].track.reached(end)
        self._stats.encoder_calls += 1

    def _decode(self, start: int, end: int, complete_S: Ids) -> None:
        self._logits_SV[start - self._start : end - self._start] = self._calls.decode(start, end, complete_S)
        self._memory.graphs["decoder"].track.reached(end)
        self._stats.decoder_calls += 1


class Speculator:
    """Starts the speculative generations of one stream. Its bound calls and its measurements are kept between them."""

    def __init__(self, memory: Memory, steps: StepCalls) -> None:
        self.memory, self.steps = memory, steps
        self.stats, self.costs = SpeculationStats(), Costs()
        self._calls: Graphs | None = None
        self._adaptive: AdaptiveDrafter | None = None

    def start(self, speculate: Speculate | Drafter, draft: int, sampler: Sampler) -> Speculation:
        """Raises UsageError for a drafter that the model cannot use."""
        drafter = speculate if isinstance(speculate, Drafter) else self._drafter(speculate, sampler)
        longest = longest_pass(self.memory, draft)
        if self._calls is None or self._calls.longest != longest:
            self._calls = Graphs(self.memory, longest, kept=True, note=self.costs.note)
        return Speculation(self, self._calls, drafter, sampler)

    def _drafter(self, name: str, sampler: Sampler) -> Drafter:
        spec = self.memory.spec
        with_entropy = spec.patch_rule.needs_entropy
        if name == "auto":
            self._adaptive = self._adaptive or AdaptiveDrafter(
                LookupDrafter(spec.capacity_bytes), self.costs, with_entropy
            )
            self._adaptive.begin(sampler)
            return self._adaptive
        if name == "lookup":
            return LookupDrafter(spec.capacity_bytes)
        if name == "decoder":
            return DecoderDrafter(sampler=sampler)
        if name == "lookup+decoder":
            return FirstOf(LookupDrafter(spec.capacity_bytes), DecoderDrafter(sampler=sampler))
        if not with_entropy:
            raise UsageError("speculate 'entropy' needs a model whose patch rule reads entropies: choose 'decoder'")
        return EntropyDrafter(sampler=sampler)
