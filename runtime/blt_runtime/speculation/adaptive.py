"""Adaptive drafting: draft only while it pays, by the measured time of calls and the measured acceptance rate.

A round runs in one of the modes: plain (no drafts), lookup, or drafts of a model. Each mode's time per byte is measured
over its rounds, where every call counts with the least time that a call of its size took. The mode with the lowest time
per byte is used; the others are retried with exponentially growing pauses. Within a round a draft is made only if its
expected saving exceeds its cost: its share of longer calls, the calls that drafting needs, and a latent call if it is
the first to close a patch.

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
from .drafters import CoupledSampler, Draft, Drafter, LookupDrafter, Source, highest_probability

Mode = Literal["plain", "lookup"] | Source
BINS = 16
"""A model's acceptance rate is measured apart for so many ranges of the most likely id's probability."""
ASSUMED_EXTRA = 0.15
"""Cost of one more token in a call, as a share of the call, before any longer call was timed."""
MIN_TIMINGS = 3
"""Calls of a size, or rounds of a mode, before their time is used."""
FIRST_PAUSE, LONGEST_PAUSE = 8, 128
"""Rounds until a slower mode is retried: at first, and at most. A retry every 128 rounds costs about 1 %."""
MARGIN = 1.02
"""Factor by which drafting must be faster than the plain mode: where no draft pays, both take the same time."""
PLANNING_SHARE = 0.02
"""Share of the time that may be spent on planning rounds that then make no draft."""


class LeastTime:
    """The least seconds that a call took. It rises slowly, so that pauses of a busy machine do not count."""

    def __init__(self) -> None:
        self.seconds, self.count = math.inf, 0

    def note(self, seconds: float) -> float:
        self.seconds = min(max(seconds, 0.0), 1.01 * self.seconds)
        self.count += 1
        return self.seconds


class CallTime:
    """Seconds of one graph's calls: `one` for one token or patch, `extra` for each further one in the call."""

    def __init__(self) -> None:
        self._by_size: dict[int, LeastTime] = {}
        self._longest = 1

    def note(self, n: int, seconds: float) -> float:
        """A call over n tokens or patches took so long. Returns the least time of such a call."""
        least = self._by_size.setdefault(n, LeastTime())
        noted = least.note(seconds)
        if least.count >= MIN_TIMINGS:
            self._longest = max(n, self._longest)
        return noted

    @property
    def measured(self) -> bool:
        return 1 in self._by_size and self._by_size[1].count >= MIN_TIMINGS

    @property
    def one(self) -> float:
        return self._by_size[1].seconds if 1 in self._by_size else 0.0

    @property
    def extra(self) -> float:
        """From the longest calls that were timed: short ones differ by too little."""
        if self._longest == 1:
            return ASSUMED_EXTRA * self.one
        return max(0.0, (self._by_size[self._longest].seconds - self.one) / (self._longest - 1))


class Rate:
    """A running rate of events, over about the last 20; it returns to the prior if there are none."""

    def __init__(self, prior: float) -> None:
        self._prior, self._hits, self._total = prior, 0.0, 0.0

    @property
    def value(self) -> float:
        return (self._hits + 2 * self._prior) / (self._total + 2)

    def note(self, hit: bool) -> None:
        self._hits, self._total = 0.95 * self._hits + hit, 0.95 * self._total + 1

    def fade(self) -> None:
        self._hits, self._total = 0.98 * self._hits, 0.98 * self._total


class Costs:
    """Times of one stream's calls, by graph, and of plain steps that close no patch.

    boundary_rate: patches closed per token. round_seconds: time of the present round, without pauses.
    """

    def __init__(self) -> None:
        self.of = {name: CallTime() for name in ("entropy", "encoder", "latent", "decoder")}
        self._step, self.boundary_rate, self.round_seconds = LeastTime(), Rate(0.2), 0.0

    @property
    def measured(self) -> bool:
        return self.of["encoder"].measured and self.of["decoder"].measured

    @property
    def plain(self) -> float:
        """Seconds per byte without drafts."""
        calls = sum(self.of[name].one for name in ("entropy", "encoder", "decoder"))
        return min(calls, self._step.seconds) + self.boundary_rate.value * self.of["latent"].one

    def note(self, graph: str, n: int, seconds: float) -> None:
        """A call over n tokens or patches took so long."""
        self.round_seconds += self.of[graph].note(n, seconds)

    def note_step(self, closed: bool, seconds: float) -> None:
        """A plain step took so long; it is a whole round. closed: it closed a patch."""
        if not closed:
            self._step.note(seconds)
        elif self._step.count:
            self.of["latent"].note(1, seconds - self._step.seconds)
        self.boundary_rate.note(closed)
        self.round_seconds += self.plain

    def draft(self, mode: Mode, number: int) -> float:
        """Seconds that the draft with this number (1, 2, ...) adds to a round."""
        entropy, encoder, latent, decoder = self.of.values()
        boundary = self.boundary_rate.value
        none_yet = (1 - boundary) ** number
        patches = boundary * (none_yet * latent.one + (1 - none_yet) * latent.extra)
        if mode == "decoder":
            return entropy.extra + encoder.one + decoder.one + patches
        return (entropy.one if mode == "entropy" else entropy.extra) + encoder.extra + decoder.extra + patches


class ModeTimes:
    """The times of one mode's newest rounds (about thirty), and the round in which the mode is retried when it is not
    the fastest."""

    def __init__(self) -> None:
        self.rounds, self._seconds, self._tokens = 0, 0.0, 0.0
        self._pause = self.retry_at = 0

    @property
    def seconds_per_token(self) -> float:
        return self._seconds / self._tokens

    def note(self, seconds: float, tokens: int) -> None:
        self._seconds, self._tokens = 0.97 * self._seconds + seconds, 0.97 * self._tokens + tokens
        self.rounds += 1

    def fastest(self, round: int) -> None:
        self._pause = FIRST_PAUSE
        self.retry_at = round + self._pause

    def retried(self, round: int) -> None:
        self._pause = min(LONGEST_PAUSE, 2 * max(FIRST_PAUSE, self._pause))
        self.retry_at = round + self._pause


class AdaptiveDrafter(Drafter):
    """Drafts by lookup, with the decoder, with the entropy model, or not: in the mode with the lowest time per byte.

    A stream keeps it, with its measurements, from one generation to the next."""

    def __init__(self, lookup: LookupDrafter, costs: Costs, with_entropy: bool) -> None:
        self._lookup, self._costs, self._choose_id = lookup, costs, CoupledSampler(None)
        self._models: tuple[Source, ...] = ("decoder", "entropy") if with_entropy else ("decoder",)
        self._without_lookup: tuple[Mode, ...] = ("plain", *self._models)
        self._modes: tuple[Mode, ...] = ("lookup", *self._without_lookup)
        self._times = {mode: ModeTimes() for mode in self._modes}
        # up to the next boundary the decoder's drafts are accepted however low their probability is
        power = {"decoder": 0.5, "entropy": 1.0}
        self._rates = {model: [Rate(((b + 0.5) / BINS) ** power[model]) for b in range(BINS)] for model in self._models}
        self._first_lookup, self._later_lookup = Rate(0.5), Rate(0.8)
        self._open: dict[int, Rate] = {}
        self._mode: Mode | None = None
        self._retrying, self._to_beat = False, 0.0
        self._round = self._unplanned = self._begin = self._accepted = 0
        self._all_accepted, self._planning, self._extending = 1.0, LeastTime(), LeastTime()

    def begin(self, sampler: Sampler) -> None:
        """A generation with that sampler begins, perhaps on another text."""
        self._lookup.clear()
        self._choose_id, self._mode = CoupledSampler(sampler), None

    def propose(self, ids_N: Ids, limit: int) -> Sequence[int]:
        if self._mode is not None:
            self._note_round(self._times[self._mode], self._costs.round_seconds, 1 + self._accepted)
        self.source, self._mode, self._accepted, self._costs.round_seconds = None, None, 0, 0.0
        self._open.clear()
        if not self._costs.measured:
            return ()
        if self._unplanned > 0:
            self._unplanned, self._mode = self._unplanned - 1, "plain"
            return ()
        began = time.perf_counter()
        self._begin, self._all_accepted, self._round = len(ids_N), 1.0, self._round + 1
        self._choose_id.begin(self._begin)
        proposed = self._lookup.propose(ids_N, limit)
        self._mode = self._choose_mode(self._modes if proposed else self._without_lookup)
        self._costs.round_seconds += self._planning.note(time.perf_counter() - began)
        if self._mode == "plain":
            self._unplanned = int(self._planning.seconds / (PLANNING_SHARE * self._costs.plain))
        if self._mode == "lookup":
            return self._that_pay(proposed)
        self.source = next((model for model in self._models if model == self._mode), None)
        return ()

    def extend(self, ids_N: Ids, logits_V: Array) -> Draft | None:
        assert self.source is not None
        began = time.perf_counter()
        draft = self._draft(self.source, ids_N, logits_V)
        self._costs.round_seconds += self._extending.note(time.perf_counter() - began)
        return draft

    def _draft(self, model: Source, ids_N: Ids, logits_V: Array) -> Draft | None:
        rate = self._rates[model][min(BINS - 1, int(highest_probability(logits_V) * BINS))]
        number = len(ids_N) - self._begin + 1
        if not self._pays(model, rate, number) and not (self._retrying and number == 1):
            rate.fade()
            return None
        self._open[len(ids_N)] = rate
        return self._choose_id(len(ids_N), logits_V), None

    def settle(self, position: int, accepted: bool) -> None:
        self._accepted += accepted
        if position in self._open:
            self._open.pop(position).note(accepted)

    def _note_round(self, times: ModeTimes, seconds: float, tokens: int) -> None:
        times.note(seconds, tokens)
        if self._retrying and tokens > 1 and seconds < tokens * self._to_beat:
            times.retry_at = self._round  # the retry was faster: retry at once

    def _choose_mode(self, modes: Sequence[Mode]) -> Mode:
        """The fastest mode, or one whose retry is due."""
        self._retrying = True
        for mode in modes:
            if self._times[mode].rounds < MIN_TIMINGS:
                return mode
        fastest = min(modes, key=lambda m: self._times[m].seconds_per_token * (1 if m == "plain" else MARGIN))
        self._to_beat = self._times[fastest].seconds_per_token
        for mode in modes:
            if mode != fastest and self._times[mode].retry_at <= self._round:
                self._times[mode].retried(self._round)
                return mode
        self._retrying = False
        self._times[fastest].fastest(self._round)
        return fastest

    def _that_pay(self, proposed: Sequence[int]) -> Sequence[int]:
        """The first of the proposed ids, as many as are expected to pay; at least one."""
        count = 0
        while count < len(proposed):
            rate = self._later_lookup if count else self._first_lookup
            if not self._pays("lookup", rate, count + 1) and count:
                break
            self._open[self._begin + count] = rate
            count += 1
        return proposed[:count]

    def _pays(self, mode: Mode, rate: Rate, number: int) -> bool:
        """Whether one more draft saves time. rate: of its acceptance if those before it are accepted."""
        self._all_accepted *= rate.value
        return self._all_accepted * self._costs.plain > self._costs.draft(mode, number)
