"""Drafters propose the bytes to come. A wrong draft costs time, never a wrong byte: `speculate` verifies all of them.

Letters: N tokens so far, V vocabulary, G length of a match.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..backends.protocol import Array
from ..ids import Ids
from ..sampling import Sampler

Draft = tuple[int, Array | None]
"""An id, and the distribution [V] that it was drawn from; None for an id that was not drawn from one."""
Source = Literal["entropy", "decoder"]
"""The model whose logits a drafter extends a text from."""


class Drafter:
    """Proposes the next ids. This base class proposes none: drafters override `propose`, `extend` or both.

    source: the model whose logits `extend` reads. With "entropy", the entropy model runs once for each draft. With
    "decoder", the encoder and the decoder run once for each draft, on the last complete patch. With None, `extend` is
    not called.

    Example:
        class Phrase(Drafter):
            def propose(self, ids_N, limit):
                return encode(" and so on", bos=False)[:limit].tolist()  # blt_runtime.ids.encode

        stream.generate(200, speculate=Phrase())
    """

    source: Source | None = None

    def propose(self, ids_N: Ids, limit: int) -> Sequence[int]:
        """Begins a round: up to `limit` ids that may follow ids [N], found without a call of a graph. `ids_N` is a view
        of the stream's memory."""
        return ()

    def extend(self, ids_N: Ids, logits_V: Array) -> Draft | None:
        """A draft of the id after ids [N], earlier drafts included, from the logits [V] of `source`; None ends the
        round's drafts.

        It is not called where those logits are not computed: without an entropy model, or with the decoder as the
        source after proposed ids."""
        return None

    def settle(self, position: int, accepted: bool) -> None:
        """Reports whether the draft at `position` was accepted. Drafts after a rejected one are not reported."""


class CoupledSampler:
    """Chooses from a drafter's logits with the random numbers that the stream's sampler will use.

    Where both distributions agree, so do the choices, and the draft is accepted. The stream's sampler is not advanced,
    so the text of a seed is the same whatever the drafter chooses."""

    def __init__(self, sampler: Sampler | None) -> None:
        self._sampler = sampler if type(sampler) is Sampler and sampler.temperature > 0 else None
        self._copy: Sampler | None = None
        self._next = 0

    def begin(self, position: int) -> None:
        """The stream's sampler will choose the id at `position` next."""
        self._copy, self._next = None, position

    def __call__(self, position: int, logits_V: Array) -> int:
        """The id at `position`; positions only rise between two calls of `begin`."""
        if self._sampler is None:
            return int(logits_V.argmax())
        if self._copy is None:
            self._copy = self._sampler.copy()
        while self._next < position:
            self._copy.skip()
            self._next += 1
        self._next += 1
        return self._copy(logits_V)


class _ModelDrafter(Drafter):
    """Samples from a model's logits, as long as the most likely id is likely enough."""

    def __init__(self, confidence: float = 0.0, sampler: Sampler | None = None) -> None:
        self._confidence, self._choose = confidence, CoupledSampler(sampler)

    def propose(self, ids_N: Ids, limit: int) -> Sequence[int]:
        self._choose.begin(len(ids_N))
        return ()

    def extend(self, ids_N: Ids, logits_V: Array) -> Draft | None:
        if self._confidence > 0 and highest_probability(logits_V) < self._confidence:
            return None
        return self._choose(len(ids_N), logits_V), None


class EntropyDrafter(_ModelDrafter):
    """Drafts with the entropy model, which reads every byte anyway. A rejected draft costs one call of it.

    confidence: drafts only while the most likely id has at least this probability. sampler: the stream's sampler.
    """

    source = "entropy"


CONFIDENCE = 0.3
"""Probability of the most likely id below which the decoder stops drafting. Of 0, 0.3 and 0.7, this one reads the least
weights per byte at the released size (docs/speculation.md)."""


class DecoderDrafter(_ModelDrafter):
    """Drafts with the decoder, which continues on the last complete patch past its end (BLT-S, arXiv 2605.08044).

    Up to the next boundary the drafts are what plain decoding would write, and the entropy model then reads all of them
    in one call. After the boundary the latent vector is outdated, and the decoder's second run verifies the drafts.
    Each draft costs the weights of the encoder and of the decoder. confidence, sampler: as for `EntropyDrafter`.
    """

    source = "decoder"

    def __init__(self, confidence: float = CONFIDENCE, sampler: Sampler | None = None) -> None:
        super().__init__(confidence, sampler)


def highest_probability(logits_V: Array) -> float:
    """The probability of the most likely id, at temperature 1."""
    return 1.0 / float(np.exp(logits_V - logits_V.max()).sum())


class LookupDrafter(Drafter):
    """Drafts what followed the newest earlier occurrence of the last `length` ids; exact, and without a model.

    A table of the capacity's size maps the hash of G ids to the newest position after them. Entries are compared with
    the text before they are used, so a rewound text does no harm.
    """

    def __init__(self, capacity: int, length: int = 6) -> None:
        self._length = length
        bits = max(8, (2 * capacity - 1).bit_length())
        self._table = np.full(1 << bits, -1, dtype=np.int32)
        self._factor_G = np.array([pow(0x9E3779B97F4A7C15, g, 1 << 64) for g in range(1, length + 1)], dtype=np.uint64)
        self._shift = np.uint64(64 - bits)
        self._indexed = 0

    def propose(self, ids_N: Ids, limit: int) -> Sequence[int]:
        end, length = len(ids_N), self._length
        if end < length:
            return ()
        if self._indexed > end:  # rewound, or slid: outdated entries fail the comparison
            self._indexed = 0
        self._index(ids_N, max(self._indexed, length), end)
        slot = ids_N[end - length :].astype(np.uint64) @ self._factor_G >> self._shift
        found = int(self._table[slot])
        self._table[slot] = end
        self._indexed = end + 1
        if not length <= found < end or ids_N[found - length : found].tolist() != ids_N[end - length :].tolist():
            return ()
        followed: list[int] = ids_N[found : found + limit].tolist()
        while len(followed) < limit:  # the match runs into the end: a period repeats
            followed += followed[: limit - len(followed)]
        return followed

    def clear(self) -> None:
        """Another text follows."""
        self._indexed = 0

    def _index(self, ids_N: Ids, start: int, end: int) -> None:
        """Enters the positions start..end (exclusive), each under the hash of the G ids before it."""
        if start < end:
            self._table[self._slots(ids_N[start - self._length : end - 1])] = np.arange(start, end)

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
    """Uses the ids of the first drafter that proposes some, and extends with the first drafter that has a source."""

    def __init__(self, *drafters: Drafter) -> None:
        self._drafters = drafters
        self._extending = next((drafter for drafter in drafters if drafter.source), Drafter())
        self.source = self._extending.source

    def propose(self, ids_N: Ids, limit: int) -> Sequence[int]:
        proposals = [drafter.propose(ids_N, limit) for drafter in self._drafters]
        return next((proposed for proposed in proposals if proposed), ())

    def extend(self, ids_N: Ids, logits_V: Array) -> Draft | None:
        return self._extending.extend(ids_N, logits_V)

    def settle(self, position: int, accepted: bool) -> None:
        for drafter in self._drafters:
            drafter.settle(position, accepted)
