"""Guessing only while it pays: what calls cost on this machine, and how often guesses of a kind came true.

A guess that is right saves one byte's share of all calls; each makes the pass longer, needs calls of whoever guesses,
and may end a patch, which costs a latent call unless another patch of the pass ends anyway. With small models the calls
themselves are the cost, with large ones the weights that they read.

Letters: N tokens so far, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from itertools import chain, repeat

from .backends.protocol import Array
from .drafters import Choice, Drafter, Guess, LookupDrafter, Source, highest_probability
from .ids import Ids
from .sampling import Sampler

BINS = 16
"""Guesses of a model are counted apart by the likeliest id's probability."""
UNMEASURED = 0.15
"""Share of a call that one more token in it is taken to cost before any such call was run."""
TIMED = 3
"""Calls after which their cost is believed."""
REST = 0.02
"""Share of the time that may go into finding out that nothing is to be gained."""


class Cost:
    """The least seconds that a call took, rising slowly, so that a busy machine's pauses pass by."""

    def __init__(self) -> None:
        self.seconds, self.notes = math.inf, 0

    def note(self, seconds: float) -> None:
        self.seconds = min(max(seconds, 0.0), 1.01 * self.seconds)
        self.notes += 1


class CallCost:
    """Of one graph's calls: over one token or patch, and for each more in it."""

    def __init__(self) -> None:
        self._one, self._more = Cost(), Cost()

    def note(self, n: int, seconds: float) -> None:
        if n == 1:
            self._one.note(seconds)
        elif self._one.notes:
            self._more.note((seconds - self._one.seconds) / (n - 1))

    @property
    def known(self) -> bool:
        return self._one.notes >= TIMED

    @property
    def one(self) -> float:
        return self._one.seconds if self._one.notes else 0.0

    @property
    def more(self) -> float:
        return self._more.seconds if self._more.notes else UNMEASURED * self.one


class Share:
    """A running share of guesses that were right; of about the last 40, and back to the prior if none are made."""

    def __init__(self, prior: float) -> None:
        self._prior, self._good, self._asked = prior, 0.0, 0.0

    @property
    def value(self) -> float:
        return (self._good + 2 * self._prior) / (self._asked + 2)

    def note(self, good: bool) -> None:
        self._good, self._asked = 0.975 * self._good + good, 0.975 * self._asked + 1

    def fade(self) -> None:
        self._good, self._asked = 0.998 * self._good, 0.998 * self._asked


class Costs:
    """Of one stream's calls, by graph, and of a plain step in which no patch ends; `closes`: share of tokens that end
    one."""

    def __init__(self) -> None:
        self.of = {name: CallCost() for name in ("entropy", "encoder", "latent", "decoder")}
        self._step = Cost()
        self.closes = Share(0.2)

    def note_step(self, closed: bool, seconds: float) -> None:
        self.closes.note(closed)
        if not closed:
            self._step.note(seconds)
        elif self._step.notes:
            self.of["latent"].note(1, seconds - self._step.seconds)

    @property
    def known(self) -> bool:
        return self.of["encoder"].known and self.of["decoder"].known

    @property
    def plain(self) -> float:
        """Seconds of a byte without guessing."""
        calls = sum(self.of[name].one for name in ("entropy", "encoder", "decoder"))
        return min(self._step.seconds, calls) + self.closes.value * self.of["latent"].one

    def guess(self, kind: Kind, place: int) -> float:
        """Seconds that the guess at `place` (1, 2, ...) of a round adds to it."""
        entropy, encoder, latent, decoder = self.of.values()
        closes = self.closes.value
        none_yet = (1 - closes) ** place
        ends = closes * (none_yet * latent.one + (1 - none_yet) * latent.more)
        if kind == "decoder":
            return entropy.more + encoder.one + decoder.one + ends
        return (entropy.one if kind == "entropy" else entropy.more) + encoder.more + decoder.more + ends


Kind = Source | None
"""Who guesses: a model, or (None) the lookup."""


class Guesser:
    """How often one model's guesses are right, by how sure it is, and by themselves."""

    def __init__(self) -> None:
        self._by_probability = [Share((b + 0.5) / BINS) for b in range(BINS)]
        self.any = Share(0.8)

    def share(self, logits_V: Array) -> Share:
        return self._by_probability[min(BINS - 1, int(highest_probability(logits_V) * BINS))]

    def fade(self) -> None:
        for share in (self.any, *self._by_probability):
            share.fade()


class Paced(Drafter):
    """Lets one of lookup, decoder and entropy model guess in a round, or none, whatever is expected to save the most
    time, and each only as far as it is."""

    def __init__(self, lookup: LookupDrafter, costs: Costs, sampler: Sampler | None, with_entropy: bool) -> None:
        self._lookup, self._costs, self._choice = lookup, costs, Choice(sampler)
        self._first, self._later = Share(0.5), Share(0.8)
        kinds: tuple[Source, ...] = ("decoder", "entropy") if with_entropy else ("decoder",)
        self._models = {kind: Guesser() for kind in kinds}
        self._open: dict[int, tuple[Share, ...]] = {}
        self._begin = self._rest = 0
        self._sure, self._limit, self._planning = 1.0, 0, Cost()

    def propose(self, ids_N: Ids, limit: int) -> Sequence[int]:
        self.source = None
        self._open.clear()
        if self._rest > 0 or not self._costs.known:
            self._rest -= 1
            return ()
        began = time.perf_counter()
        self._begin, self._sure, self._limit = len(ids_N), 1.0, limit
        self._choice.begin(self._begin)
        proposed = self._lookup.propose(ids_N, limit)
        best, count = self._best(None, chain([self._first.value], repeat(self._later.value)), 1, len(proposed))
        for kind, model in self._models.items():
            saved, guesses = self._best(kind, repeat(model.any.value), 1, limit)
            if saved > best:
                best, count, self.source = saved, guesses, kind
        self._planning.note(time.perf_counter() - began)
        if self.source is not None:
            return ()
        if not count:
            self._give_up()
        for place in range(count):
            self._open[self._begin + place] = (self._later if place else self._first,)
        return proposed[:count]

    def extend(self, ids_N: Ids, logits_V: Array) -> Guess | None:
        assert self.source is not None
        model, place = self._models[self.source], len(ids_N) - self._begin + 1
        share = model.share(logits_V)
        shares = chain([share.value], repeat(model.any.value))
        if not self._best(self.source, shares, place, self._limit)[1]:
            share.fade()
            return None
        self._sure *= share.value
        self._open[len(ids_N)] = (share, model.any)
        return self._choice(len(ids_N), logits_V), None

    def settle(self, position: int, right: bool) -> None:
        for share in self._open.pop(position, ()):
            share.note(right)

    def _best(self, kind: Kind, shares: Iterator[float], place: int, last: int) -> tuple[float, int]:
        """The most seconds that guesses from `place` up to `last` can save if they are right by those shares, and how
        many guesses save them."""
        worth, sure, saved, best = self._costs.plain, self._sure, 0.0, (0.0, 0)
        for p in range(place, last + 1):
            sure *= next(shares)
            saved += sure * worth - self._costs.guess(kind, p)
            if saved > best[0]:
                best = saved, p - place + 1
        return best

    def _give_up(self) -> None:
        """Nothing pays now: try again later, and sooner where trying is cheap."""
        for share in (self._first, self._later):
            share.fade()
        for model in self._models.values():
            model.fade()
        self._rest = int(self._planning.seconds / (REST * self._costs.plain))
