"""Several bytes for one pass of the decoder, and the same bytes as without: guess, check, keep what is right.

A round takes in one certain byte and, in the same calls, guesses at those behind it: the entropy model reads
them (it says where a patch ends), one encoder and one decoder call run over all up to the next patch's end.
The guesses wait there. Each time a byte is asked for, the sampler chooses it from the target's own logits; if
the next guess is what it chose, nothing is left to do but to count it in. Otherwise the guesses are dropped and
a new round begins. So the stream never shows a byte that was not chosen, and its state is at any moment that of
plain decoding; caches alone have been written further.

Why dropping is exact: caches are addressed by position, and no round writes further than every cache can take
back (`CacheTrack.room`). Why a pass may run from behind a patch's end up to the next one: all these bytes read
the same last patch, whose latent step belongs to the certain byte. The byte that ends a patch is guessed and
checked, but runs in the next round. So the latent transformer never runs in vain.

Rounding: a pass over S bytes and S passes over one differ by about 1e-6 in the logits. Where the target's two
likeliest ids lie closer together than that, greedy output may take the other one, as it may after a prefill.

Letters: S tokens of a pass (the certain one and S - 1 guesses), V vocabulary, W patches that a byte reads.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, get_args

from .backends.protocol import Array
from .drafters import Drafter, EntropyDrafter, LookupDrafter
from .errors import UsageError, nearest
from .ids import Ids
from .memory import Mark, Memory
from .pace import Costs, Paced
from .passes import PassCalls, longest_pass
from .patching import PatchState
from .sampling import Sampler, is_whole
from .step import StepCalls

Speculate = Literal["off", "auto", "entropy", "lookup"]


@dataclass
class SpeculationStats:
    """What speculation did on a stream since it was made. `tokens` were generated with it; `passes` counts decoder
    calls, `latent_calls` latent calls, `guesses` what was verified by them and `right` how many of those came true."""

    tokens: int = 0
    passes: int = 0
    latent_calls: int = 0
    guesses: int = 0
    right: int = 0

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / max(1, self.passes)

    @property
    def tokens_per_latent_call(self) -> float:
        return self.tokens / max(1, self.latent_calls)


class Speculation:
    """One run of generation with guesses: `choose` an id, `take` it in, again and again.

    Positions up to `_checked` have gone through the decoder; guesses stand in the history up to `_guessed`; the
    entropy model has read up to `_read`. All three are at most what `position` is when nothing is ahead.
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
        self._drawn_from: dict[int, Array] = {}
        self.forget()

    def forget(self) -> None:
        """Drops all guesses: somebody else has used the stream."""
        self._checked = self._guessed = self._read = self._base = 0
        self._drawn_from.clear()

    def choose(self) -> int:
        """The next id, distributed as the sampler's choice from the stream's logits, or the same for a guess that
        was not drawn."""
        logits_V, q_V = self._steps.logits_V, self._drawn_from.get(self._memory.position)
        if q_V is None or self._memory.position >= self._guessed:
            return self._sampler(logits_V)
        return self._sampler.judge(logits_V, self._guess_at(self._memory.position), q_V)

    def take(self, id: int) -> None:
        """Takes in the chosen id: counted in if it was guessed and checked, and else by a round."""
        memory, t = self._memory, self._memory.position
        memory.check_room(1)
        self._drawn_from.pop(t, None)
        guessed = t < self._guessed and self._guess_at(t) == id
        if t < self._guessed:
            self._drafter.settle(t, guessed, guessed and t < self._checked)
        if guessed and t < self._checked:
            self._count_in(id, t)
        else:
            if not guessed:
                self._checked = self._guessed = self._read = t
                self._drawn_from.clear()
            self._round(id, t)
        self._stats.tokens += 1

    def _guess_at(self, t: int) -> int:
        return int(self._memory.ids.array[0, self._memory.pad + t])

    def _ids_before(self, t: int) -> Ids:
        ids_N: Ids = self._memory.ids.array[0, self._memory.pad : self._memory.pad + t]
        return ids_N

    def _count_in(self, id: int, t: int) -> None:
        memory = self._memory
        memory.rule.closes(id, self._entropy_at(t))
        memory.position = t + 1
        self._steps.logits_V[:] = self._calls.logits_SV[t - self._base]
        self._stats.right += 1

    def _entropy_at(self, t: int) -> float:
        return self._memory.entropies.array[0, t].item() if self._with_entropy else 0.0

    def _round(self, id: int, t: int) -> None:
        """Takes in `id` as `Stream._step` does, and guesses behind it in the same calls."""
        memory, steps = self._memory, self._steps
        steps.set_token(id, t)
        self._guessed = max(self._guessed, t + 1)
        limit = self._limit(t)
        self._propose(t, limit)
        rule = memory.rule.copy()
        closes = rule.closes(id, self._entropy_at(t))
        end = self._extend(rule.copy(), t + 1, limit)
        seconds = self._encode(id, t, end)
        memory.position, memory.rule = t + 1, rule
        if closes:
            steps.latent(t + 1)
            memory.marks.append(Mark(t + 1, memory.patches, rule.copy()))
            self._stats.latent_calls += 1
        seconds += self._decode(end - t)
        self._base, self._checked = t, end
        self._note(end - t, seconds)

    def _note(self, tokens: int, seconds: float) -> None:
        self._costs.note_pass(tokens, seconds)
        self._stats.passes += 1
        self._stats.guesses += tokens - 1
        for graph in self._graphs:
            graph.track.reached(self._read if graph.spec.name == "entropy" else self._checked)

    def _encode(self, id: int, t: int, end: int) -> float:
        """The encoder over positions t..end; how many seconds it took."""
        memory, steps, start = self._memory, self._steps, time.perf_counter()
        if end > t + 1:
            self._calls.encode(t, end)
            return time.perf_counter() - start
        steps.set_token(id, t)  # the one-token inputs may hold a guess by now
        if memory.hash is not None:
            memory.hash.one(memory.window(t, t + 1), steps.hash_D)
        steps.encoder()
        steps.keep_state(t)
        return time.perf_counter() - start

    def _decode(self, tokens: int) -> float:
        start = time.perf_counter()
        if tokens == 1:
            self._steps.decoder()
        else:
            self._calls.decode(tokens)
            self._steps.logits_V[:] = self._calls.logits_SV[0]
        return time.perf_counter() - start

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

    def _propose(self, t: int, limit: int) -> None:
        """Guesses that need no call, and the entropy model over position t and all of them."""
        standing = self._ids_before(self._guessed)[t + 1 :].tolist()
        if len(standing) < limit and self._goes_on(self._guessed):
            proposed = self._drafter.propose(self._ids_before(t + 1), limit)
            if list(proposed[: len(standing)]) == standing:
                for id in proposed[len(standing) :]:
                    self._guess(id)
                    if not self._goes_on(self._guessed):
                        break
        if not self._with_entropy or self._read >= self._guessed:
            return
        if self._guessed == self._read + 1:
            self._read_one(self._read)
        else:
            self._calls.read(self._read, self._guessed)
            self._steps.entropy_logits_V[:] = self._calls.entropy_logits_SV[self._guessed - self._read - 1]
            self._read = self._guessed

    def _guess(self, id: int) -> None:
        """Writes a guess behind the last."""
        self._steps.set_token(id, self._guessed)
        self._guessed += 1

    def _read_one(self, t: int) -> None:
        """The entropy model over position t."""
        start = time.perf_counter()
        self._steps.set_token(self._guess_at(t), t)
        self._steps.entropy()
        self._steps.entropy_of(t)
        self._costs.read.note(time.perf_counter() - start)
        self._read = t + 1

    def _extend(self, rule: PatchState, start: int, limit: int) -> int:
        """Where the pass ends: before the guess that ends a patch, or after `limit` guesses; makes more of them."""
        t = start
        while t - start < limit:
            if t == self._guessed and not self._guess_more(t):
                break
            if rule.closes(self._guess_at(t), self._entropy_at(t)):
                break
            t += 1
        return t

    def _guess_more(self, t: int) -> bool:
        """One more guess at t from the entropy model's logits, if there is one; none begins a document."""
        if not self._with_entropy or not self._goes_on(t):
            return False
        guess = self._drafter.extend(self._ids_before(t), self._entropy_at(t - 1), self._steps.entropy_logits_V)
        if guess is None:
            return False
        id, q_V = guess
        if q_V is not None:
            self._drawn_from[t] = q_V
        self._guess(id)
        self._read_one(t)
        return True

    def _goes_on(self, t: int) -> bool:
        """Position t is not the first of a document."""
        memory = self._memory
        return bool(memory.documents.array[0, t] < t and memory.entropy_documents.array[0, t] < t)


class Speculator:
    """Starts runs with guesses on one stream. Its calls are made for the first, and kept."""

    def __init__(self, memory: Memory, steps: StepCalls) -> None:
        self.memory, self.steps = memory, steps
        self.stats, self.costs = SpeculationStats(), Costs()
        self._calls: PassCalls | None = None

    def start(self, speculate: Speculate | Drafter, draft: int, sampler: Sampler) -> Speculation:
        """Raises UsageError for a name that is unknown or that the model cannot follow."""
        if not is_whole(draft) or draft < 1:
            raise UsageError("draft must be a whole number of at least 1")
        drafter = speculate if isinstance(speculate, Drafter) else self._drafter(speculate, sampler)
        longest = longest_pass(self.memory, draft)
        if self._calls is None or self._calls.longest != longest:
            self._calls = PassCalls(self.memory, self.steps, longest)
        return Speculation(self, self._calls, drafter, sampler)

    def _drafter(self, name: str, sampler: Sampler) -> Drafter:
        spec = self.memory.spec
        with_entropy = spec.patch_rule.needs_entropy
        if name == "auto":
            return Paced(LookupDrafter(spec.capacity_bytes), self.costs)
        if name == "lookup":
            return LookupDrafter(spec.capacity_bytes)
        if name == "entropy" and not with_entropy:
            raise UsageError("speculate 'entropy' needs a model whose patch rule reads entropies: choose 'lookup'")
        if name == "entropy":
            return EntropyDrafter(sampler=sampler if type(sampler) is Sampler else None)
        raise UsageError(f"speculate {name!r} is unknown: {nearest(name, get_args(Speculate))}")
