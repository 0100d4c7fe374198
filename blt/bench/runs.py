"""One timed generation of given bytes.

The stream computes everything that generation computes. The sampler draws a byte, but the stream reads the given one.
So no model can end a run, repeat itself or drift to other patch sizes, and runs are comparable.

Letters: N bytes of text, P patches, V vocabulary.
"""

from __future__ import annotations

import copy
import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blt_runtime import Model, Stream
from blt_runtime.backends.counts import Counts
from blt_runtime.errors import CapacityError, InputError, UsageError
from blt_runtime.ids import encode
from blt_runtime.sampling import Sampler
from blt_runtime.speculation.speculate import Speculate, SpeculationStats

Ids = NDArray[np.int64]

_WORDS = (
    "the of and to in a is that it was for on are with as they be at one have this from or had by but some what there "
    "we can out other were all your when up use word how said an each she which do their time if will way about many "
    "then them would write like so these her long make thing see him two has look more day could go come did sound no "
    "most number who over know water than call first people may down side been now find any new work part take get "
    "place made live where after back little only round year came show every good me give our under name very through "
    "just form much great think say help low line before turn cause same mean differ move right old too does tell set "
    "three want air well also play small end put home read hand port large spell add even land here must big high such "
    "follow act why ask change went light kind off need house picture try us again animal point world near build earth"
)


def bench_text(n: int) -> bytes:
    """`n` bytes of common English words in sentences without meaning; always the same.

    A shorter text is the beginning of a longer one.
    """
    random, vocabulary, text = Random(0), _WORDS.split(), bytearray()
    while len(text) < n:
        words = [vocabulary[int(random.random() * len(vocabulary))] for _ in range(5 + int(10 * random.random()))]
        text += (" ".join(words).capitalize() + ". ").encode()
    return bytes(text[:n])


class Forced(Sampler):
    """Samples at `temperature`, discards the draw and returns the next of the given ids."""

    def __init__(self, ids: Iterable[int], temperature: float) -> None:
        super().__init__(temperature, seed=0)
        self._ids = iter(ids)

    def __call__(self, logits_V: NDArray[Any]) -> int:
        super().__call__(logits_V)
        return next(self._ids)


@dataclass(frozen=True)
class Text:
    """The prompt of a run and the bytes that it then generates, both as ids without BOS."""

    prompt: Ids
    new: Ids

    @classmethod
    def of(cls, data: bytes, prompt_bytes: int, new_bytes: int) -> Text:
        """The first bytes of `data`. Raises UsageError for a size too small to measure, InputError for short data."""
        if prompt_bytes < 1 or new_bytes < 2:
            raise UsageError(
                "a run needs at least 1 byte of prompt and 2 new bytes: a gap is the time between two bytes"
            )
        if len(data) < prompt_bytes + new_bytes:
            raise InputError(f"the text has {len(data):,} bytes, but the run needs {prompt_bytes + new_bytes:,}")
        ids_N = encode(data[: prompt_bytes + new_bytes], bos=False)
        return cls(ids_N[:prompt_bytes], ids_N[prompt_bytes:])

    def check_room(self, capacity: int) -> None:
        """Raises CapacityError unless a stream of `capacity` tokens holds BOS and the whole text."""
        n = 1 + len(self.prompt) + len(self.new)
        if n > capacity:
            raise CapacityError(
                f"BOS, {len(self.prompt):,} bytes of prompt and {len(self.new):,} new bytes are {n:,} tokens, but a "
                f"stream holds {capacity:,}: give fewer bytes, or export with a larger --capacity"
            )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One timed generation.

    prefill_s: seconds of reading the prompt. first_byte_s: from the start of the prefill to the first byte. gaps_s:
    between two bytes. closed: patches that were completed while the gaps were timed, which is the number of latent
    calls. speculation: counts of the whole run. requests: to the device, in the gaps; None without one.
    """

    prefill_s: float
    first_byte_s: float
    gaps_s: Sequence[float]
    closed: int
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    requests: Counts | None = None

    @property
    def bytes_per_s(self) -> float:
        """After the first byte."""
        return len(self.gaps_s) / sum(self.gaps_s)

    @property
    def mean_patch(self) -> float:
        """Bytes per latent call in the timed part; infinity if there was none."""
        return len(self.gaps_s) / self.closed if self.closed else math.inf


def run(
    stream: Stream,
    text: Text,
    sampler: Sampler,
    *,
    speculate: Speculate = "off",
    after_first: Callable[[], None] = lambda: None,
    counts: Counts | None = None,
) -> Run:
    """Reads the prompt, then generates. Drafts that differ from the given bytes are rejected. `after_first` is called
    after the first byte and is not timed. counts: those of the model's backend."""
    gc.collect()
    began = time.perf_counter()
    stream.append_ids(text.prompt)
    read = time.perf_counter()
    stamps = []
    for _ in stream.generate_ids(len(text.new), sampler=sampler, stop_at_eos=False, speculate=speculate):
        stamps.append(time.perf_counter())
        if len(stamps) == 1:
            after_first()
            before = replace(counts) if counts else None
            resumed = time.perf_counter()
    gaps = [b - a for a, b in pairwise([resumed, *stamps[1:]])]
    starts_P = np.cumsum(stream.patch_lengths)[:-1]
    timed_from = stream.position - len(gaps)  # position of the first token after the first byte
    return Run(
        prefill_s=read - began,
        first_byte_s=stamps[0] - began,
        gaps_s=gaps,
        closed=int((starts_P > timed_from).sum()),
        speculation=stream.speculation,
        requests=counts.since(before) if counts and before else None,
    )


def with_changes(model: Model, **changes: Any) -> Model:
    """A copy of the model with another backend or spec. Weights and tables are shared."""
    other = copy.copy(model)
    vars(other).update(changes)
    return other
