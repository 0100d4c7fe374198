"""Guesses at the bytes to come. A guess costs time if it is wrong, never a wrong byte: `speculate` checks all.

Letters: N tokens so far, V vocabulary, G length of a match.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .backends.protocol import Array
from .ids import Ids
from .sampling import Sampler

Guess = tuple[int, Array | None]
"""An id, and the distribution [V] that it was drawn from; None for a guess that was not drawn."""


class Drafter:
    """Says what may come next. This one never does: drafters override one method or both."""

    def propose(self, ids_N: Ids, limit: int) -> Sequence[int]:
        """Up to `limit` ids that may follow ids [N], known without any call. `ids_N` is a view of the stream's."""
        return ()

    def extend(self, ids_N: Ids, entropy: float, logits_V: Array) -> Guess | None:
        """The id behind ids [N], guesses included, from what the entropy model says of it (nats, logits [V]), or None.

        Not asked where the patch rule does without an entropy model."""
        return None

    def settle(self, position: int, right: bool, saved: bool) -> None:
        """What came of the guess at `position`: it was right, and a pass was saved by it. Guesses behind a wrong
        one are never settled."""


class EntropyDrafter(Drafter):
    """What the entropy model holds for likeliest; it reads every byte anyway.

    limit: goes on only while the entropy is at most this (nats); None has no limit. sampler: draws the guess
    with the sampler's own settings, which are accepted more often than the likeliest where sampling is lively.
    """

    def __init__(self, limit: float | None = None, sampler: Sampler | None = None) -> None:
        self._limit = np.inf if limit is None else limit
        self._sampler = sampler if sampler is not None and sampler.temperature > 0 else None

    def extend(self, ids_N: Ids, entropy: float, logits_V: Array) -> Guess | None:
        if entropy > self._limit:
            return None
        if self._sampler is None:
            return int(logits_V.argmax()), None
        return self._sampler.draft(logits_V)


class LookupDrafter(Drafter):
    """What followed the newest earlier place with the same last `length` ids; exact, and without any model.

    One table of the capacity's size holds, per hash of G ids, the newest place behind them. Entries are
    compared with the text before they are believed, so a rewound text does no harm.
    """

    def __init__(self, capacity: int, length: int = 6) -> None:
        self._length = length
        bits = max(8, (2 * capacity - 1).bit_length())
        self._place = np.full(1 << bits, -1, dtype=np.int32)
        self._factor_G = np.array([pow(0x9E3779B97F4A7C15, g, 1 << 64) for g in range(1, length + 1)], dtype=np.uint64)
        self._shift = np.uint64(64 - bits)
        self._known = 0

    def propose(self, ids_N: Ids, limit: int) -> Sequence[int]:
        end, length = len(ids_N), self._length
        if end < length:
            return ()
        if self._known > end:  # rewound; entries behind `end` fail the comparison
            self._known = end
        self._learn(ids_N, max(self._known, length), end)
        slot = ids_N[end - length :].astype(np.uint64) @ self._factor_G >> self._shift
        place = int(self._place[slot])
        self._place[slot] = end
        self._known = end + 1
        if not length <= place < end or ids_N[place - length : place].tolist() != ids_N[end - length :].tolist():
            return ()
        followed: list[int] = ids_N[place : place + limit].tolist()
        while len(followed) < limit:  # the match runs into the end: a period repeats
            followed += followed[: limit - len(followed)]
        return followed

    def _learn(self, ids_N: Ids, start: int, end: int) -> None:
        """Notes the places start..end (exclusive), each behind the ids that lead to it."""
        if start < end:
            self._place[self._slots(ids_N[start - self._length : end - 1])] = np.arange(start, end)

    def _slots(self, ids_N: Ids) -> Array:
        """The table slot of every run of G ids."""
        n = len(ids_N) - self._length + 1
        hash_N = np.zeros(n, dtype=np.uint64)
        unsigned_N = ids_N.astype(np.uint64)
        for g, factor in enumerate(self._factor_G):
            hash_N += unsigned_N[g : g + n] * factor
        slots: Array = hash_N >> self._shift
        return slots


class FirstOf(Drafter):
    """The first drafter that proposes something; past that, the first that extends it."""

    def __init__(self, *drafters: Drafter) -> None:
        self._drafters = drafters

    def propose(self, ids_N: Ids, limit: int) -> Sequence[int]:
        for drafter in self._drafters:
            if proposed := drafter.propose(ids_N, limit):
                return proposed
        return ()

    def extend(self, ids_N: Ids, entropy: float, logits_V: Array) -> Guess | None:
        guesses: Any = (drafter.extend(ids_N, entropy, logits_V) for drafter in self._drafters)
        return next((guess for guess in guesses if guess is not None), None)
