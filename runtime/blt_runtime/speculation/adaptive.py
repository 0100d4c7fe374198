"""Guessing only while it pays, by what rounds and calls take on this machine and by how often guesses come true.

Every round's calls are added up, each with the least time that a call of its size took, together with the bytes that
came of it: separately for rounds without guesses, those that were looked up and those in which a model guessed. The way
with the least seconds per byte goes on, the others are tried again now and then, ever more rarely. Within a round a
guess is made only if what it is expected to save is more than it costs: its share of longer calls, the calls of whoever
guesses, and a latent call if it is the first to end a patch.

Letters: N tokens so far, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Literal

from ..backends.protocol import Array
from ..ids import Ids
from ..sampling import Sampler
from .drafters import Choice, Drafter, Guess, LookupDrafter, Source, highest_probability

Way = Literal["plain", "lookup"] | Source
BINS = 16
"""Guesses of a model are counted apart by the likeliest id's probability."""
UNMEASURED = 0.15
"""Share of a call that one more token in it is taken to cost before any such call was run."""
TIMED = 3
"""Calls and rounds after which their time is believed."""
SOONEST, LATEST = 8, 128
"""Rounds until a way that lost is tried again: at first, and at most. One in 128 costs about 1 %."""
MARGIN = 1.02
"""By how much guessing must be better than none: where all is refused both are the same."""
REST = 0.02
"""Share of the time that may go into finding out that nothing is to be gained."""


class Cost:
    """The least seconds that a call took, rising slowly, so that a busy machine's pauses pass by."""

    def __init__(self) -> None:
        self.seconds, self.notes = math.inf, 0

    def note(self, seconds: float) -> float:
        self.seconds = min(max(seconds, 0.0), 1.01 * self.seconds)
        self.notes += 1
        return self.seconds


class CallCost:
    """Of one graph's calls: over one token or patch, and for each more in it."""

    def __init__(self) -> None:
        self._by_size: dict[int, Cost] = {}
        self._longest = 1

    def note(self, n: int, seconds: float) -> float:
        """Returns what such a call takes at least."""
        cost = self._by_size.setdefault(n, Cost())
        least = cost.note(seconds)
        if cost.notes >= TIMED:
            self._longest = max(n, self._longest)
        return least

    @property
    def known(self) -> bool:
        return 1 in self._by_size and self._by_size[1].notes >= TIMED

    @property
    def one(self) -> float:
        return self._by_size[1].seconds if 1 in self._by_size else 0.0

    @property
    def more(self) -> float:
        """By the longest calls that were timed: short ones differ by too little."""
        if self._longest == 1:
            return UNMEASURED * self.one
        return max(0.0, (self._by_size[self._longest].seconds - self.one) / (self._longest - 1))


class Share:
    """A running share of guesses that were right; of about the last 20, and back to the prior if none are made."""

    def __init__(self, prior: float) -> None:
        self._prior, self._good, self._asked = prior, 0.0, 0.0

    @property
    def value(self) -> float:
        return (self._good + 2 * self._prior) / (self._asked + 2)

    def note(self, good: bool) -> None:
        self._good, self._asked = 0.95 * self._good + good, 0.95 * self._asked + 1

    def fade(self) -> None:
        self._good, self._asked = 0.98 * self._good, 0.98 * self._asked


class Costs:
    """Of one stream's calls, by graph, and of plain steps in which no patch ends. closes: share of tokens that end a
    patch. round: seconds of the present round, but for pauses."""

    def __init__(self) -> None:
        self.of = {name: CallCost() for name in ("entropy", "encoder", "latent", "decoder")}
        self._step, self.closes, self.round = Cost(), Share(0.2), 0.0

    @property
    def known(self) -> bool:
        return self.of["encoder"].known and self.of["decoder"].known

    @property
    def plain(self) -> float:
        """Seconds of a byte without guessing."""
        calls = sum(self.of[name].one for name in ("entropy", "encoder", "decoder"))
        return min(calls, self._step.seconds) + self.closes.value * self.of["latent"].one

    def note(self, graph: str, n: int, seconds: float) -> None:
        """A call over n tokens or patches took so long."""
        self.round += self.of[graph].note(n, seconds)

    def note_step(self, closed: bool, seconds: float) -> None:
        """A plain step took so long; it is a round of its own."""
        if not closed:
            self._step.note(seconds)
        elif self._step.notes:
            self.of["latent"].note(1, seconds - self._step.seconds)
        self.closes.note(closed)
        self.round += self.plain

    def guess(self, way: Way, place: int) -> float:
        """Seconds that the guess at `place` (1, 2, ...) of a round adds to it."""
        entropy, encoder, latent, decoder = self.of.values()
        closes = self.closes.value
        none_yet = (1 - closes) ** place
        ends = closes * (none_yet * latent.one + (1 - none_yet) * latent.more)
        if way == "decoder":
            return entropy.more + encoder.one + decoder.one + ends
        return (entropy.one if way == "entropy" else entropy.more) + encoder.more + decoder.more + ends


class Trials:
    """What the newest thirty or so rounds of one way took, and when it is tried again though another is better."""

    def __init__(self) -> None:
        self.rounds, self._seconds, self._tokens = 0, 0.0, 0.0
        self._pause = self.again = 0

    @property
    def rate(self) -> float:
        """Seconds per token."""
        return self._seconds / self._tokens

    def note(self, seconds: float, tokens: int) -> None:
        self._seconds, self._tokens = 0.97 * self._seconds + seconds, 0.97 * self._tokens + tokens
        self.rounds += 1

    def won(self, turn: int) -> None:
        self._pause = SOONEST
        self.again = turn + self._pause

    def tried(self, turn: int) -> None:
        self._pause = min(LATEST, 2 * max(SOONEST, self._pause))
        self.again = turn + self._pause


class Paced(Drafter):
    """Lets the lookup, the decoder or the entropy model guess in a round, or nobody: whatever takes least per byte.

    Kept from one generation to the next with what it has learned."""

    def __init__(self, lookup: LookupDrafter, costs: Costs, with_entropy: bool) -> None:
        self._lookup, self._costs, self._choice = lookup, costs, Choice(None)
        self._models: tuple[Source, ...] = ("decoder", "entropy") if with_entropy else ("decoder",)
        self._ways_of_models: tuple[Way, ...] = ("plain", *self._models)
        self._ways: tuple[Way, ...] = ("lookup", *self._ways_of_models)
        self._trials = {way: Trials() for way in self._ways}
        # the decoder is right up to the patch's end however unsure it is
        power = {"decoder": 0.5, "entropy": 1.0}
        self._shares = {
            model: [Share(((b + 0.5) / BINS) ** power[model]) for b in range(BINS)] for model in self._models
        }
        self._first, self._later = Share(0.5), Share(0.8)
        self._open: dict[int, Share] = {}
        self._way: Way | None = None
        self._trying, self._to_beat = False, 0.0
        self._turn = self._rest = self._begin = self._right = 0
        self._sure, self._planning, self._extending = 1.0, Cost(), Cost()

    def begin(self, sampler: Sampler) -> None:
        """Guesses for that sampler from now on, and perhaps in another text."""
        self._lookup.forget()
        self._choice, self._way = Choice(sampler), None

    def propose(self, ids_N: Ids, limit: int) -> Sequence[int]:
        if self._way is not None:
            self._note_round(self._trials[self._way], self._costs.round, 1 + self._right)
        self.source, self._way, self._right, self._costs.round = None, None, 0, 0.0
        self._open.clear()
        if not self._costs.known:
            return ()
        if self._rest > 0:
            self._rest, self._way = self._rest - 1, "plain"
            return ()
        began = time.perf_counter()
        self._begin, self._sure, self._turn = len(ids_N), 1.0, self._turn + 1
        self._choice.begin(self._begin)
        proposed = self._lookup.propose(ids_N, limit)
        self._way = self._choose(self._ways if proposed else self._ways_of_models)
        self._costs.round += self._planning.note(time.perf_counter() - began)
        if self._way == "plain":
            self._rest = int(self._planning.seconds / (REST * self._costs.plain))
        if self._way == "lookup":
            return self._first_of(proposed)
        self.source = next((model for model in self._models if model == self._way), None)
        return ()

    def extend(self, ids_N: Ids, logits_V: Array) -> Guess | None:
        assert self.source is not None
        began = time.perf_counter()
        guess = self._guess(self.source, ids_N, logits_V)
        self._costs.round += self._extending.note(time.perf_counter() - began)
        return guess

    def _guess(self, model: Source, ids_N: Ids, logits_V: Array) -> Guess | None:
        share = self._shares[model][min(BINS - 1, int(highest_probability(logits_V) * BINS))]
        place = len(ids_N) - self._begin + 1
        if not self._pays(model, share, place) and not (self._trying and place == 1):
            share.fade()
            return None
        self._open[len(ids_N)] = share
        return self._choice(len(ids_N), logits_V), None

    def settle(self, position: int, right: bool) -> None:
        self._right += right
        if position in self._open:
            self._open.pop(position).note(right)

    def _note_round(self, trials: Trials, seconds: float, tokens: int) -> None:
        trials.note(seconds, tokens)
        if self._trying and tokens > 1 and seconds < tokens * self._to_beat:
            trials.again = self._turn  # tried with success: again at once

    def _choose(self, ways: Sequence[Way]) -> Way:
        """The quickest way, or one that is due to be tried."""
        self._trying = True
        for way in ways:
            if self._trials[way].rounds < TIMED:
                return way
        best = min(ways, key=lambda way: self._trials[way].rate * (1 if way == "plain" else MARGIN))
        self._to_beat = self._trials[best].rate
        for way in ways:
            if way != best and self._trials[way].again <= self._turn:
                self._trials[way].tried(self._turn)
                return way
        self._trying = False
        self._trials[best].won(self._turn)
        return best

    def _first_of(self, proposed: Sequence[int]) -> Sequence[int]:
        """As many as are expected to pay, one at least."""
        count = 0
        while count < len(proposed):
            share = self._later if count else self._first
            if not self._pays("lookup", share, count + 1) and count:
                break
            self._open[self._begin + count] = share
            count += 1
        return proposed[:count]

    def _pays(self, way: Way, share: Share, place: int) -> bool:
        """Whether one more guess saves time, right by that share if those before it are."""
        self._sure *= share.value
        return self._sure * self._costs.plain > self._costs.guess(way, place)
