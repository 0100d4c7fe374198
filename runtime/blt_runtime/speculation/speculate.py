"""Several bytes for one pass of the decoder, and the same bytes as without: guess, check, keep what is right.

A round takes in one certain byte together with guesses at those behind it, patches' ends among them: the entropy model
reads them all, the patch rule says where patches end, one encoder call runs over them, one latent call over the
patches that would end, one decoder call in which each byte reads its own last finished patch. The guesses wait there.
Each time a byte is asked for, the sampler chooses it from the target's own logits; if the next guess is what it chose,
nothing is left to do but to count it in. Otherwise the guesses are dropped and a new round begins. So the stream never
shows a byte that was not chosen, and its state is at any moment that of plain decoding; caches alone, and the rows
behind the last counted position and patch, have been written further.

Why dropping is exact: all memory is addressed by position or by patch, and no round writes further than every cache
can take back (`CacheTrack.room`), than the ring of patch vectors has rows to spare (`AHEAD`), or into another document.

Where the decoder is the one who guesses, its steps before the first end of a patch are what the pass would compute:
only what is behind runs again.

Rounding: a pass over S bytes and S passes over one differ by about 1e-6 in the logits. Where the target's two
likeliest ids lie closer together than that, greedy output may take the other one, as it may after a prefill.

Letters: S tokens of a pass (the certain one and S - 1 guesses), V vocabulary, W patches that a byte reads.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..backends.protocol import Array
from ..engine.memory import AHEAD, Mark, Memory
from ..engine.passes import PassCalls, longest_pass
from ..engine.step import StepCalls
from ..errors import UsageError
from ..ids import Ids
from ..sampling import Sampler
from .adaptive import Costs, Paced
from .drafters import DecoderDrafter, Drafter, EntropyDrafter, FirstOf, LookupDrafter

Speculate = Literal["off", "auto", "decoder", "entropy", "lookup", "lookup+decoder"]


@dataclass
class SpeculationStats:
    """What speculation did on a stream since it was made. `tokens` were generated with it, in `passes` rounds;
    `guesses` were verified and `right` of them came true; calls of each graph, drafts included.

    Example:
        list(stream.generate(200, speculate="auto"))
        print(stream.speculation.tokens_per_pass)
    """

    tokens: int = 0
    passes: int = 0
    guesses: int = 0
    right: int = 0
    entropy_calls: int = 0
    encoder_calls: int = 0
    latent_calls: int = 0
    decoder_calls: int = 0

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / max(1, self.passes)

    @property
    def tokens_per_latent_call(self) -> float:
        return self.tokens / max(1, self.latent_calls)


class Speculation:
    """One run of generation with guesses: `choose` an id, `take` it in, again and again.

    A round has run everything over positions `_start` to `_end`; those from `position` on are guesses.
    """

    def __init__(self, of: Speculator, calls: PassCalls, drafter: Drafter, sampler: Sampler) -> None:
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
        self.forget()

    def forget(self) -> None:
        """Drops all guesses: somebody else has used the stream."""
        self._start = self._end = 0
        self._drawn_from.clear()

    def choose(self) -> int:
        """The next id, distributed as the sampler's choice from the stream's logits, or the same for a guess that
        was not drawn."""
        logits_V, t = self._steps.logits_V, self._memory.position
        q_V = self._drawn_from.get(t) if t < self._end else None
        return self._sampler(logits_V) if q_V is None else self._sampler.judge(logits_V, self._guess_at(t), q_V)

    def take(self, id: int) -> None:
        """Takes in the chosen id: counted in if it was guessed, and else by a round."""
        memory, t = self._memory, self._memory.position
        memory.check_room(1)
        guessed = t < self._end and self._guess_at(t) == id
        if t < self._end:
            self._drafter.settle(t, guessed)
        if guessed:
            self._count_in(id, t)
        else:
            self._drawn_from.clear()
            self._round(id, t)
        self._stats.tokens += 1

    def _guess_at(self, t: int) -> int:
        return int(self._memory.ids.array[0, self._memory.pad + t])

    def _ids_before(self, t: int) -> Ids:
        ids_N: Ids = self._memory.ids.array[0, self._memory.pad : self._memory.pad + t]
        return ids_N

    def _count_in(self, id: int, t: int) -> None:
        self._stats.right += 1
        self._steps.logits_V[:] = self._logits_SV[t - self._start]
        if self._advance(id, t):
            self._steps.read_patches()

    def _advance(self, id: int, t: int) -> bool:
        """Counts one more token, and its patch if that ends here."""
        memory = self._memory
        closes = memory.rule.closes(id, self._entropy_at(t))
        memory.position = t + 1
        self._costs.closes.note(closes)
        if closes:
            memory.close_patch(t + 1)
            memory.marks.append(Mark(t + 1, memory.patches, memory.rule.copy()))
        return closes

    def _entropy_at(self, t: int) -> float:
        return self._memory.entropies.array[0, t].item() if self._with_entropy else 0.0

    def _round(self, id: int, t: int) -> None:
        """Takes in `id` as `StepCalls.take` does, and guesses behind it in the same calls."""
        self._start = self._end = t
        self._steps.set_token(id, t)
        limit = max(0, self._limit(t))
        proposed = self._drafter.propose(self._ids_before(t + 1), limit)
        if not proposed and self._drafter.source is None and self._costs.known:
            return self._step(id)
        end = t + 1
        for guess in proposed:
            if end - t > limit or not self._goes_on(end):
                break
            self._steps.set_token(guess, end)
            end += 1
        read = decoded = t
        if self._drafter.source == "entropy" and self._with_entropy:
            read = end = self._draft_with_entropy(t, end, limit)
        elif self._drafter.source == "decoder" and not proposed:
            end, decoded = self._draft_with_decoder(t, limit)
        return self._verify(id, t, end, read, decoded)

    def _step(self, id: int) -> None:
        """Nothing is guessed: a plain step, which is a little cheaper than a pass over one token."""
        stats, patches, began = self._stats, self._memory.patches, time.perf_counter()
        self._steps.take(id)
        closed = self._memory.patches > patches
        self._costs.note_step(closed, time.perf_counter() - began)
        stats.passes += 1
        stats.entropy_calls += self._with_entropy
        stats.encoder_calls += 1
        stats.latent_calls += closed
        stats.decoder_calls += 1

    def _verify(self, id: int, t: int, end: int, read: int, decoded: int) -> None:
        """Runs what is left to run over positions t..end: the entropy model has read up to `read`, encoder and decoder
        have run up to `decoded`."""
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
        again = min(decoded, t + complete_S.count(before))  # from the first end of a patch on, patches are others
        if again < end:
            self._decode(again, end, np.array(complete_S[again - t :]))
        self._steps.logits_V[:] = self._logits_SV[0]
        self._end = end
        self._stats.passes += 1
        self._stats.guesses += end - t - 1

    def _close_patches(self, id: int, t: int, end: int) -> list[int]:
        """Takes in the certain token, and finds the patches that end up to `end`, or up to where one ends too many.
        Finished patches [S] behind every token."""
        memory = self._memory
        first = memory.patches
        self._advance(id, t)
        counted, rule = memory.patches, memory.rule.copy()
        room, complete = self._patch_room(first, counted), [counted]
        for s in range(t + 1, end):
            closes = rule.closes(self._guess_at(s), self._entropy_at(s))
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
        """How many patches may end behind the `patches` that are counted, in one latent call from `first` on, so
        that all of them can be taken back."""
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

    def _limit(self, t: int) -> int:
        """How many guesses may follow position t, so that every cache can take all of them back.

        A ring's call must not cross its end either, and nothing follows the end of a document in one call.
        """
        memory, spec = self._memory, self._memory.spec
        if not self._goes_on(t + 1):
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
        """Guesses behind position `end` from the entropy model's logits; it reads all of them. Their end."""
        read = t
        while True:
            logits_V = self._read(read, end)[-1]
            read = end
            if not self._guess(end, limit - (end - t - 1), logits_V):
                return end
            end += 1

    def _draft_with_decoder(self, t: int, limit: int) -> tuple[int, int]:
        """Guesses behind position t from the decoder's logits, as if no patch ended: their end, and how far the
        decoder has run. It must be able to go back to t."""
        end, complete = t + 1, np.array([self._memory.patches])
        limit = min(limit, self._memory.graphs["decoder"].track.room(t, int(self._memory.documents.array[0, t])))
        while end - t <= limit:
            self._encode(end - 1, end)
            self._decode(end - 1, end, complete)
            if not self._guess(end, limit - (end - t - 1), self._logits_SV[end - 1 - t]):
                return end, end
            end += 1
        return end, end - 1

    def _guess(self, t: int, limit: int, logits_V: Array) -> bool:
        """One more guess, at t, if there is one; none begins a document."""
        if limit < 1 or not self._goes_on(t):
            return False
        guess = self._drafter.extend(self._ids_before(t), logits_V)
        if guess is None:
            return False
        id, q_V = guess
        if q_V is not None:
            self._drawn_from[t] = q_V
        self._steps.set_token(id, t)
        return True

    def _goes_on(self, t: int) -> bool:
        """Position t is not the first of a document."""
        memory = self._memory
        return bool(memory.documents.array[0, t] < t and memory.entropy_documents.array[0, t] < t)

    def _read(self, start: int, end: int) -> Array:
        logits_SV = self._calls.read(start, end)
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
    """Starts runs with guesses on one stream. Its calls are made for the first, and kept."""

    def __init__(self, memory: Memory, steps: StepCalls) -> None:
        self.memory, self.steps = memory, steps
        self.stats, self.costs = SpeculationStats(), Costs()
        self._calls: PassCalls | None = None
        self._paced: Paced | None = None

    def start(self, speculate: Speculate | Drafter, draft: int, sampler: Sampler) -> Speculation:
        """Raises UsageError for a drafter that the model cannot use."""
        drafter = speculate if isinstance(speculate, Drafter) else self._drafter(speculate, sampler)
        longest = longest_pass(self.memory, draft)
        if self._calls is None or self._calls.longest != longest:
            self._calls = PassCalls(self.memory, self.costs, longest)
        return Speculation(self, self._calls, drafter, sampler)

    def _drafter(self, name: str, sampler: Sampler) -> Drafter:
        spec = self.memory.spec
        with_entropy = spec.patch_rule.needs_entropy
        if name == "auto":
            self._paced = self._paced or Paced(LookupDrafter(spec.capacity_bytes), self.costs, with_entropy)
            self._paced.begin(sampler)
            return self._paced
        if name == "lookup":
            return LookupDrafter(spec.capacity_bytes)
        if name == "decoder":
            return DecoderDrafter(sampler=sampler)
        if name == "lookup+decoder":
            return FirstOf(LookupDrafter(spec.capacity_bytes), DecoderDrafter(sampler=sampler))
        if not with_entropy:
            raise UsageError("speculate 'entropy' needs a model whose patch rule reads entropies: choose 'decoder'")
        return EntropyDrafter(sampler=sampler)
