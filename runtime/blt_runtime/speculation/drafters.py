"""Guesses at the bytes to come. A guess costs time if it is wrong, never a wrong byte: `speculate` checks all.

Letters: N tokens so far, V vocabulary, G length of a match.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..backends.protocol import Array
from ..ids import Ids
from ..sampling import Sampler

Guess = tuple[int, Array | None]
"""An id, and the distribution [V] that it was drawn from; None for a guess that was not drawn from one."""
Source = Literal["entropy", "decoder"]
"""Whose logits a drafter extends a text from."""


class Drafter:
    """Says what may come next. This one never does: drafters override one method or both.

    source: the model whose logits `extend` is given. "entropy" reads each guess once more than a pass would, "decoder"
    runs encoder and decoder once for each, with the last finished patch; None: `extend` is not asked.

    Example:
        class Phrase(Drafter):
            def propose(self, ids_N, limit):
                return encode(" and so on", bos=False)[:limit].tolist()  # blt_runtime.ids.encode

        stream.generate(200, speculate=Phrase())
    """

    source: Source | None = None

    def propose(self, ids_N: Ids, limit: int) -> Sequence[int]:
        """Up to `limit` ids that may follow ids [N], known without any call. `ids_N` is a view of the stream's.
        A round of guessing begins here."""
        return ()

    def extend(self, ids_N: Ids, logits_V: Array) -> Guess | None:
        """The id behind ids [N], guesses included, from what `source` makes of it (logits [V]), or None.

        Where nothing reads the source's logits (no entropy model; the decoder behind proposed ids), it is not asked."""
        return None

    def settle(self, position: int, right: bool) -> None:
        """What came of the guess at `position`. Guesses behind a wrong one are never settled."""


class Choice:
    """What the sampler would choose if a guesser's logits were the model's own: it draws the numbers that the sampler
    will draw. So where both agree the guess is right, and the text is that of the seed whatever they say."""

    def __init__(self, sampler: Sampler | None) -> None:
        self._sampler = sampler if type(sampler) is Sampler and sampler.temperature > 0 else None
        self._twin: Sampler | None = None
        self._next = 0

    def begin(self, position: int) -> None:
        """The sampler will choose the id at `position` next."""
        self._twin, self._next = None, position

    def __call__(self, position: int, logits_V: Array) -> int:
        """The id at `position`; positions only rise between two calls of `begin`."""
        if self._sampler is None:
            return int(logits_V.argmax())
        if self._twin is None:
            self._twin = self._sampler.twin()
        while self._next < position:
            self._twin.skip()
            self._next += 1
        self._next += 1
        return self._twin(logits_V)


class _ModelDrafter(Drafter):
    """What a model's logits make the sampler choose, while the likeliest id is likely enough."""

    def __init__(self, confidence: float = 0.0, sampler: Sampler | None = None) -> None:
        self._confidence, self._choice = confidence, Choice(sampler)

    def propose(self, ids_N: Ids, limit: int) -> Sequence[int]:
        self._choice.begin(len(ids_N))
        return ()

    def extend(self, ids_N: Ids, logits_V: Array) -> Guess | None:
        if self._confidence > 0 and highest_probability(logits_V) < self._confidence:
            return None
        return self._choice(len(ids_N), logits_V), None


class EntropyDrafter(_ModelDrafter):
    """What the entropy model would write; it reads every byte anyway. A wrong guess costs one read.

    confidence: goes on only while the likeliest id has at least this probability. sampler: the stream's sampler.
    """

    source = "entropy"


CONFIDENCE = 0.3
"""Of the likeliest id, below which the decoder stops guessing: the least weights read per byte at the released size, of
0, 0.3 and 0.7 (docs/speculation.md)."""


class DecoderDrafter(_ModelDrafter):
    """What the decoder writes when patches do not end: it goes on with the last finished one (BLT-S, arXiv 2605.08044).

    Up to the patch's end that is what it would have written anyway, and the entropy model then reads all of it in one
    call; behind it the latent vector is old and the decoder's second run says what was right. Each guess costs the
    weights of the encoder and of the decoder. confidence, sampler: as for the entropy model.
    """

    source = "decoder"

    def __init__(self, confidence: float = CONFIDENCE, sampler: Sampler | None = None) -> None:
        super().__init__(confidence, sampler)


def highest_probability(logits_V: Array) -> float:
    """Of the likeliest id, at temperature 1."""
    return 1.0 / float(np.exp(logits_V - logits_V.max()).sum())


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
        if self._known > end:  # rewound, or slid; what no longer holds fails the comparison
            self._known = 0
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

    def forget(self) -> None:
        """Another text follows."""
        self._known = 0

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
    """The first drafter that proposes something; past that, the first that has a source extends it."""

    def __init__(self, *drafters: Drafter) -> None:
        self._drafters = drafters
        self._extending = next((drafter for drafter in drafters if drafter.source), Drafter())
        self.source = self._extending.source

    def propose(self, ids_N: Ids, limit: int) -> Sequence[int]:
        proposals = [drafter.propose(ids_N, limit) for drafter in self._drafters]
        return next((proposed for proposed in proposals if proposed), ())

    def extend(self, ids_N: Ids, logits_V: Array) -> Guess | None:
        return self._extending.extend(ids_N, logits_V)

    def settle(self, position: int, right: bool) -> None:
        for drafter in self._drafters:
            drafter.settle(position, right)
