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

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from .backends.protocol import Array, Buffer, Call
from .drafters import Drafter, EntropyDrafter, FirstOf, LookupDrafter
from .errors import UsageError, nearest
from .ids import Ids
from .memory import Mark, Memory
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


class Speculation:
    """One run of generation with guesses: `choose` an id, `take` it in, again and again.

    Positions up to `_checked` have gone through the decoder; guesses stand in the history up to `_guessed`; the
    entropy model has read up to `_read`. All three are at most what `position` is when nothing is ahead.
    """

    def __init__(
        self,
        memory: Memory,
        steps: StepCalls,
        calls: PassCalls,
        drafter: Drafter,
        sampler: Sampler,
        stats: SpeculationStats,
    ) -> None:
        self._memory, self._steps, self._calls = memory, steps, calls
        self._drafter, self._sampler, self._stats = drafter, sampler, stats
        self._with_entropy = memory.spec.patch_rule.needs_entropy
        self._byte_graphs = [name for name in memory.graphs if name != "latent" and (self._reads(name))]
        self._rings = [
            graph
            for name, graph in memory.graphs.items()
            if name != "latent" and graph.spec.cache is not None and graph.spec.cache.kind == "ring"
        ]
        self._drawn_from: dict[int, Array] = {}
        self.forget()

    def _reads(self, name: str) -> bool:
        return name != "entropy" or self._with_entropy

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
        memory, steps, calls = self._memory, self._steps, self._calls
        steps.set_token(id, t)
        self._guessed = max(self._guessed, t + 1)
        limit = self._limit(t)
        self._propose(t, limit)
        rule = memory.rule.copy()
        closes = rule.closes(id, self._entropy_at(t))
        end = self._extend(rule.copy(), t + 1, limit)
        if end == t + 1:
            self._encode_one(id, t)
        else:
            calls.encode(t, end)
        memory.position, memory.rule = t + 1, rule
        if closes:
            steps.latent(t + 1)
            memory.marks.append(Mark(t + 1, memory.patches, rule.copy()))
            self._stats.latent_calls += 1
        if end == t + 1:
            steps.decoder()
        else:
            calls.decode(end - t)
            steps.logits_V[:] = calls.logits_SV[0]
        self._base, self._checked = t, end
        self._note(end - t - 1)

    def _note(self, guesses: int) -> None:
        self._stats.passes += 1
        self._stats.guesses += guesses
        for graph in self._rings:
            graph.track.reached(self._read if graph.spec.name == "entropy" else self._checked)

    def _encode_one(self, id: int, t: int) -> None:
        memory, steps = self._memory, self._steps
        steps.set_token(id, t)  # the one-token inputs may hold a guess by now
        if memory.hash is not None:
            memory.hash.one(memory.window(t, t + 1), steps.hash_D)
        steps.encoder()
        steps.keep_state(t)

    def _limit(self, t: int) -> int:
        """How many guesses may follow position t, so that every cache can take all of them back.

        A ring's call must not cross its end either, and nothing follows the end of a document in one call.
        """
        memory, spec = self._memory, self._memory.spec
        if not self._goes_on(t + 1):
            return 0
        limit = min(self._calls.longest - 1, spec.capacity_bytes - t - 1)
        for name in self._byte_graphs:
            documents = memory.entropy_documents if name == "entropy" else memory.documents
            track = memory.graphs[name].track
            limit = min(limit, track.room(t + 1, int(documents.array[0, t + 1])))
            if track.spec is not None and track.spec.kind == "ring":
                limit = min(limit, track.spec.capacity - 1 - t % track.spec.capacity)
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
        self._steps.set_token(self._guess_at(t), t)
        self._steps.entropy()
        self._steps.entropy_of(t)
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
        self._memory, self._steps = memory, steps
        self._calls: PassCalls | None = None
        self.stats = SpeculationStats()

    def start(self, speculate: Speculate | Drafter, draft: int, sampler: Sampler) -> Speculation:
        """Raises UsageError for a name that is unknown or that the model cannot follow."""
        if not is_whole(draft) or draft < 1:
            raise UsageError("draft must be a whole number of at least 1")
        drafter = speculate if isinstance(speculate, Drafter) else self._drafter(speculate, sampler)
        longest = longest_pass(self._memory, draft)
        if self._calls is None or self._calls.longest != longest:
            self._calls = PassCalls(self._memory, self._steps, longest)
        return Speculation(self._memory, self._steps, self._calls, drafter, sampler, self.stats)

    def _drafter(self, name: str, sampler: Sampler) -> Drafter:
        spec = self._memory.spec
        with_entropy = spec.patch_rule.needs_entropy
        lookup = LookupDrafter(spec.capacity_bytes)
        if name == "lookup" or (name == "auto" and not with_entropy):
            return lookup
        if name == "entropy" and not with_entropy:
            raise UsageError("speculate 'entropy' needs a model whose patch rule reads entropies: choose 'lookup'")
        if name == "entropy":
            return EntropyDrafter(sampler=sampler if type(sampler) is Sampler else None)
        if name == "auto":
            return FirstOf(lookup, EntropyDrafter())
        raise UsageError(f"speculate {name!r} is unknown: {nearest(name, get_args(Speculate))}")
