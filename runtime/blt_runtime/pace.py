"""Guessing only while it pays: what calls cost on this machine, and how often guesses of a kind came true.

A guess that is right saves a pass over one byte; a wrong one costs a read of the entropy model; each makes the pass a
little longer. With small models the calls themselves are the cost, with large ones the weights that they read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .backends.protocol import Array
from .drafters import Drafter, Guess, LookupDrafter
from .ids import Ids

BINS, PER_NAT = 16, 4
"""Guesses of the entropy model are counted apart by its entropy, in steps of a quarter nat."""
UNMEASURED = 0.15
"""Share of a pass that one more byte in it is taken to cost before any was run."""


class Cost:
    """The least seconds that a call took, rising slowly, so that a busy machine's pauses pass by."""

    def __init__(self) -> None:
        self.seconds = math.inf

    def note(self, seconds: float) -> None:
        self.seconds = min(max(seconds, 0.0), 1.01 * self.seconds)


class Costs:
    """Of one stream's calls: `read` of the entropy model, a pass over `one` byte, each byte `more` in it."""

    def __init__(self) -> None:
        self.read, self.one, self._more = Cost(), Cost(), Cost()

    def note_pass(self, tokens: int, seconds: float) -> None:
        if tokens == 1:
            self.one.note(seconds)
        elif self.one.seconds < math.inf:
            self._more.note((seconds - self.one.seconds) / (tokens - 1))

    @property
    def more(self) -> float:
        return self._more.seconds if self._more.seconds < math.inf else UNMEASURED * self.one.seconds


class Share:
    """A running share of guesses that were worth it; of about the last 40, and back to the prior if none are made."""

    def __init__(self, prior: float) -> None:
        self._prior, self._good, self._asked = prior, 0.0, 0.0

    @property
    def value(self) -> float:
        return (self._good + 2 * self._prior) / (self._asked + 2)

    def note(self, good: bool) -> None:
        self._good, self._asked = 0.975 * self._good + good, 0.975 * self._asked + 1

    def fade(self) -> None:
        self._good, self._asked = 0.998 * self._good, 0.998 * self._asked


class Paced(Drafter):
    """Looks up, then asks the entropy model, and each only as far as it is expected to save time."""

    def __init__(self, lookup: LookupDrafter, costs: Costs) -> None:
        self._lookup, self._costs = lookup, costs
        # a distribution of entropy h has a likeliest id of at least exp(-h)
        self._by_entropy = [Share(math.exp(-(b + 0.5) / PER_NAT)) for b in range(BINS)]
        self._first, self._later = Share(0.5), Share(0.8)
        self._open: dict[int, Share] = {}
        self._sure, self._end = 1.0, -1

    def propose(self, ids_N: Ids, limit: int) -> Sequence[int]:
        proposed = self._lookup.propose(ids_N, limit)
        self._sure, self._end = 1.0, len(ids_N)
        if not proposed:
            return ()
        costs, count = self._costs, 0
        one, read = costs.one.seconds, costs.read.seconds if costs.read.seconds < math.inf else 0.0
        while count < len(proposed):
            share = self._later if count else self._first
            if one == math.inf or self._sure * share.value * (one + read) <= costs.more * (1 + read / one):
                if not count:
                    share.fade()
                break
            self._sure *= share.value
            self._open[self._end] = share
            self._end += 1
            count += 1
        return proposed[:count]

    def extend(self, ids_N: Ids, entropy: float, logits_V: Array) -> Guess | None:
        if len(ids_N) != self._end:  # guesses of an earlier round stand, and were right so far
            self._sure, self._end = 1.0, len(ids_N)
        share = self._by_entropy[min(BINS - 1, int(entropy * PER_NAT))]
        costs, sure = self._costs, self._sure * share.value
        if costs.one.seconds == math.inf or sure * costs.one.seconds <= costs.more + (1 - sure) * costs.read.seconds:
            share.fade()
            return None
        self._sure, self._end = sure, self._end + 1
        self._open[len(ids_N)] = share
        return int(logits_V.argmax()), None

    def settle(self, position: int, right: bool, saved: bool) -> None:
        share = self._open.pop(position, None)
        if share is not None:  # a patch's end that was looked up cost no call of its own: right is enough
            share.note(right if share in (self._first, self._later) else saved)
        if not right:
            self._open.clear()
