"""The options of generation: one list, one set of defaults and one validation for every entry point.

`Stream.generate`, `Stream.generate_ids`, `Model.generate_text`, `Scheduler.submit` and `Scheduler.submit_ids` take them
as keywords, as `options=GenerateOptions(...)`, or as both: a keyword then replaces that field of `options`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict, get_args

import numpy as np

from .arguments import choice, flag, instance, whole
from .errors import UsageError, nearest
from .grammar import Grammar
from .sampling import Sampler, check_sampling
from .speculation.drafters import Drafter
from .speculation.speculate import Speculate
from .text import StopMatcher, listed_stops

Stop = Iterable[str | bytes] | str | bytes | None
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "grammar")
"""The options that a `Sampler` replaces."""


class GenerateKeywords(TypedDict, total=False):
    """The fields of `GenerateOptions` as keywords of a method."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    stop: Stop
    stop_at_eos: bool
    speculate: Speculate | Drafter
    draft: int
    grammar: Grammar | None


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How bytes are generated.

    temperature: 0 chooses the most likely byte; otherwise the logits are divided by it and a byte is drawn.
    top_k: draw from this many most likely bytes. top_p: draw from the smallest set of most likely bytes with this
    share of the probability, above 0 and at most 1. min_p: drop bytes with less than this share of the most likely
    byte's probability, 0 to 1. They apply in this order; None leaves one out.
    seed: makes the draws repeatable. None draws from the stream's generator, or from a fresh one in a scheduler.
    stop: end before this text, or before the first of several. stop_at_eos: end where the model writes an end of
    document; False reads it into the stream and goes on.
    speculate: "off", or the drafter of speculative decoding: "auto" (adaptive drafting), "lookup", "decoder",
    "lookup+decoder", "entropy", or a `Drafter`. draft: ids that are drafted for one pass at most. A scheduler does not
    speculate.
    grammar: what the text must match (`blt_runtime.grammar.Grammar`). The text ends where the grammar is complete; one
    that the limit or a stop string ends is a prefix of a match. It needs stop_at_eos.

    Example:
        careful = GenerateOptions(temperature=0.3, top_p=0.9, stop=["\\n\\n"])
        stream.generate(200, options=careful)
        stream.generate(200, options=careful, seed=1)  # a keyword replaces the field

    Raises UsageError for a value of the wrong type or out of range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Stop = None
    stop_at_eos: bool = True
    speculate: Speculate | Drafter = "off"
    draft: int = 16
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        check_sampling(self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, seed=self.seed)
        if self.stop is not None and not isinstance(self.stop, str | bytes):
            object.__setattr__(self, "stop", listed_stops(self.stop))  # an iterator would be empty the second time
        StopMatcher(self.stop)
        flag("stop_at_eos", self.stop_at_eos)
        if not isinstance(self.speculate, Drafter):
            choice("speculate", self.speculate, get_args(Speculate))
        whole("draft", self.draft, 1)
        if self.grammar is not None:
            instance("grammar", self.grammar, Grammar, "a Grammar (blt_runtime.grammar)")
            if not self.stop_at_eos:
                raise UsageError("a text under a grammar ends at EOS: leave stop_at_eos at True, or grammar out")

    def sampler(self, random: np.random.Generator | None = None) -> Sampler:
        """A sampler with these options. random: the generator to draw from where no seed is set."""
        seed = random if self.seed is None else self.seed
        make = Sampler if self.grammar is None else self.grammar.sampler
        return make(self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p, seed=seed)


NAMES = tuple(field.name for field in fields(GenerateOptions))


def resolve(
    options: GenerateOptions | None, keywords: Mapping[str, Any], sampler: Sampler | None = None
) -> GenerateOptions:
    """`options` (None: the defaults) with the fields in `keywords` replaced. Raises UsageError for an unknown keyword
    or a bad value, and for a sampling keyword beside a `sampler`, which would be ignored."""
    if options is not None:
        instance("options", options, GenerateOptions, "GenerateOptions")
    if sampler is not None:
        instance("sampler", sampler, Sampler, "a Sampler")
    for name in keywords:
        if name not in NAMES:
            raise UsageError(f"unknown option {name!r} of generation: {nearest(name, NAMES)}")
        if sampler is not None and name in SAMPLING:
            raise UsageError(f"{name} has no effect beside a sampler: leave out one of them")
    chosen = replace(options or GenerateOptions(), **keywords)
    if sampler is not None and chosen.grammar is not None:
        raise UsageError("the grammar of the options has no effect beside a sampler: make the sampler with it")
    return chosen
