"""All comparisons in order: the training form with the slow reference, then each cached form with the training form.

Rows under the model's own rule hold the requested bytes. Each other rule gets an eighth of that in addition.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np

from blt.checkpoint.models import Checkpoint
from blt.evaluate.cache_check.candidates import Candidate
from blt.evaluate.cache_check.cases import OWN, Case, Cases
from blt.evaluate.cache_check.comparison import Comparison
from blt.evaluate.cache_check.report import TOLERANCE, Line, Report
from blt.evaluate.cache_check.text import forced_lengths, take
from blt.evaluate.cache_check.uncached import Uncached, forced
from blt.generate import reference
from blt_runtime import Model
from blt_runtime.errors import UsageError
from blt_runtime.ids import Ids
from blt_runtime.patching import closes_from_lengths

SHARE = 8
"""Each other rule gets this fraction (1/8) of the bytes."""
SLOW_ROWS, SLOW_BYTES = 3, 200
"""Rows that the slow reference computes under the own rule (one under each other rule), and their length. 1,400 bytes
take it 7 s."""
PROMPTS = (0, 5, 60, 300)
"""Bytes of the prompts of greedy texts, after BOS; 0 is the empty text."""
Progress = Callable[[float], object]


def check(
    checkpoint: Checkpoint,
    models: Mapping[str, Model],
    n_bytes: int,
    *,
    row_bytes: int = 2048,
    seed: int = 0,
    data: bytes | None = None,
    greedy: int = 64,
    rules: Collection[str] | None = None,
    tolerance: float = TOLERANCE,
    progress: Progress | None = None,
) -> Report:
    """Compare every cached form in `models` (keyed by its name in the report) with its checkpoint, uncached.

    n_bytes: text under the model's own rule; other rules add more.  row_bytes: of one row, reduced to what the
    checkpoint was trained for and to what a stream holds.  data: text to use instead of generated text.  greedy: ids
    to generate after each prompt.  rules: names of `cases.rules_for`, all by default.  progress: called with the
    fraction of the work (of 1) done since its last call.

    Raises UsageError for sizes below 1, empty `data` or no models, CheckpointError for a checkpoint that cannot
    generate. Differences are reported, not raised.
    """
    if min(n_bytes, row_bytes, greedy) < 1 or not models or data == b"":
        raise UsageError("a check needs a model, and at least one byte of text, of each row and of greedy text")
    uncached = Uncached(checkpoint)
    specs = [model.spec for model in models.values()]
    cases = Cases(uncached, specs, row_bytes=row_bytes, seed=seed, data=data, tolerance=tolerance)
    checker = _Checker(uncached, models, cases)
    chosen = [name for name in cases.rules if rules is None or name in rules]
    shares = {name: n_bytes if name == OWN else max(1, n_bytes // SHARE) for name in chosen}
    for name, share in shares.items():
        checker.slow(name)
        candidates, left = checker.candidates(name), share
        for group in cases.groups(name, share):
            done = min(checker.compare(candidates, name, group), left)
            left -= done
            if progress is not None:
                progress(done / sum(shares.values()))
    checker.greedy(min(greedy, cases.most_ids // 2, cases.most_patches // 2))
    return checker.report(seed)


class _Checker:
    """Runs the comparisons and fills the lines of the report."""

    def __init__(self, uncached: Uncached, models: Mapping[str, Model], cases: Cases) -> None:
        self._uncached, self._models, self._cases = uncached, models, cases
        self._lines: dict[tuple[str, str, str], Line] = {}
        self._rows = self._bytes = self._longest_row = self._longest_patch = 0

    def report(self, seed: int) -> Report:
        return Report(
            lines=tuple(self._lines.values()),
            n_bytes=self._bytes,
            rows=self._rows,
            longest_row=self._longest_row,
            longest_patch=self._longest_patch,
            seed=seed,
        )

    def line(self, form: str, how: str, rule: str) -> Line:
        key = (form, how, rule)
        return self._lines.setdefault(key, Line(*key, self._cases.tolerance))

    def slow(self, name: str) -> None:
        """The training form against the slow reference, on short rows."""
        line = self.line("whole rows", "against blt.generate.reference", name)
        for index, row in enumerate(self._cases.short(name, SLOW_ROWS if name == OWN else 1, SLOW_BYTES)):
            comparison = Comparison(row, line, f"rule {name!r}, short row {index}")
            ids, at_N = row.ids_N.tolist(), np.arange(len(row))
            lengths = reference.lengths_of(self._uncached.checkpoint, ids, row.rule)
            closes_N = closes_from_lengths(lengths)
            comparison.boundaries(closes_N)
            if self._uncached.entropy is not None:
                entropies_N, _ = reference.entropies(self._uncached.entropy, ids, row.rule.reset_newlines)
                comparison.entropies(at_N, entropies_N.detach().numpy())
            trace = reference.forward(self._uncached.blt, ids, lengths)
            comparison.logits(at_N, trace.logits.numpy(), closes_N)

    def candidates(self, name: str) -> list[Candidate]:
        rule = None if name == OWN else self._cases.rules[name]
        return [
            Candidate(model, rule, lambda how, form=form: self.line(form, how, name))  # type: ignore[misc]
            for form, model in self._models.items()
        ]

    def compare(self, candidates: list[Candidate], name: str, group: list[Case]) -> int:
        """Run a group of rows through every cached form. Returns the bytes in it."""
        given = self._with_given_patches(group[-1]) if name == OWN else None
        for candidate in candidates:
            for case in group:
                candidate.prefill(case)
            if given is not None:
                candidate.prefill(*given)
            candidate.scripts(group, self._cases.random(2, self._rows))
        self._rows += len(group)
        for row in [case.row for case in (group if given is None else [*group, given[0]])]:
            ends_P = np.flatnonzero(row.closes_N) + 1
            self._longest_row = max(self._longest_row, len(row))
            self._longest_patch = max(self._longest_patch, int(np.diff(ends_P, prepend=0).max(initial=0)))
        done = sum(case.n_bytes for case in group)
        self._bytes += done
        return done

    def _with_given_patches(self, case: Case) -> tuple[Case, Ids] | None:
        """The row under given patch lengths: many short patches, and a few longer than any chunk."""
        lengths_P = forced_lengths(len(case.row), self._cases.chunk, self._cases.random(3, self._rows))
        if len(lengths_P) > self._cases.most_patches:
            return None
        return replace(case, row=forced(case.row, lengths_P), where=f"{case.where}, given patches"), lengths_P

    def greedy(self, n: int) -> None:
        """`n` greedy ids after each prompt, under the own rule."""
        cases, random = self._cases, self._cases.random(4)
        rule = cases.rules[OWN]
        pieces = cases.text(random, rule)
        most = min(cases.most_ids, cases.most_patches) - n - 1
        sizes = [min(size, most, cases.row_bytes) for size in PROMPTS]
        prompts = [cases.row(take(pieces, size, bos=True), rule).ids_N for size in sizes]
        expected = [self._uncached.greedy(prompt, n) for prompt in prompts]
        for candidate in self.candidates(OWN):
            candidate.greedy(
                prompts, expected, lambda ids_N: self._uncached.row(ids_N, rule, tolerance=cases.tolerance), random
            )
