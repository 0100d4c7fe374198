"""All comparisons in order: the training form with the slow reference, then each cached form with the training form.

Rows under the model's own rule hold the bytes asked for; an eighth of that is taken in addition under each other rule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np

from blt.checkpoint.models import Checkpoint
from blt.evaluate.cache_check.jobs import OWN, Job, Rows
from blt.evaluate.cache_check.judge import TOLERANCE, Judge, Line, Report
from blt.evaluate.cache_check.sides import Side
from blt.evaluate.cache_check.text import forced_lengths, take
from blt.evaluate.cache_check.truth import Uncached, forced
from blt.generate import reference
from blt_runtime import Model
from blt_runtime.errors import UsageError
from blt_runtime.ids import Ids
from blt_runtime.patching import closes_from_lengths

SHARE = 8
"""Each other rule gets one part in so many of the bytes."""
SLOW_ROWS, SLOW_BYTES = 3, 200
"""Rows that the slow reference computes, too (under the other rules one), and their length: 7 s for 1,400 bytes."""
PROMPTS = (0, 5, 60, 300)
"""Bytes of the prompts of greedy texts, behind BOS; 0 is the empty text."""
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
    """Compare every model of `models` (its name in the report -> the cached side) with its checkpoint, uncached.

    n_bytes: of text under the model's own rule; there is more under others.  row_bytes: of one row, cut to what the
    checkpoint was trained for and to what a stream holds.  data: text to use instead of generated text.  greedy: ids
    to write behind each prompt.  rules: names of `jobs.rules_for`, all by default.  progress: called with the share
    of the work (of 1) done since its last call.

    Raises UsageError for numbers that make no sense, CheckpointError for a checkpoint that cannot generate. Whatever
    differs is in the report and not raised.
    """
    if min(n_bytes, row_bytes, greedy) < 1 or not models or data == b"":
        raise UsageError("a check needs a model, and at least one byte of text, of each row and of greedy text")
    uncached = Uncached(checkpoint)
    rows = Rows(uncached, (model.spec for model in models.values()), row_bytes, seed, data, tolerance)
    bench = _Bench(uncached, models, rows)
    chosen = [name for name in rows.rules if rules is None or name in rules]
    shares = {name: n_bytes if name == OWN else max(1, n_bytes // SHARE) for name in chosen}
    for name, share in shares.items():
        bench.slow(name)
        sides, left = bench.sides(name), share
        for group in rows.groups(name, share):
            done = min(bench.compare(sides, name, group), left)
            left -= done
            if progress is not None:
                progress(done / sum(shares.values()))
    bench.greedy(min(greedy, rows.most_ids // 2, rows.most_patches // 2))
    return bench.report(seed)


class _Bench:
    """The lines of the report, and what fills them."""

    def __init__(self, uncached: Uncached, models: Mapping[str, Model], rows: Rows) -> None:
        self._uncached, self._models, self._rows = uncached, models, rows
        self._lines: dict[tuple[str, str, str], Line] = {}
        self._jobs = self._bytes = self._longest_row = self._longest_patch = 0

    def report(self, seed: int) -> Report:
        lines = tuple(self._lines.values())
        return Report(lines, self._bytes, self._jobs, self._longest_row, self._longest_patch, seed)

    def line(self, form: str, how: str, rule: str) -> Line:
        key = (form, how, rule)
        return self._lines.setdefault(key, Line(*key, self._rows.tolerance))

    def slow(self, name: str) -> None:
        """The training form against the slow reference, on short rows."""
        line = self.line("whole rows", "against blt.generate.reference", name)
        for index, row in enumerate(self._rows.short(name, SLOW_ROWS if name == OWN else 1, SLOW_BYTES)):
            judge = Judge(row, line, f"rule {name!r}, short row {index}")
            ids, at_N = row.ids_N.tolist(), np.arange(len(row))
            lengths = reference.lengths_of(self._uncached.checkpoint, ids, row.rule)
            closes_N = closes_from_lengths(lengths)
            judge.boundaries(closes_N)
            if self._uncached.entropy is not None:
                entropies_N, _ = reference.entropies(self._uncached.entropy, ids, row.rule.reset_newlines)
                judge.entropies(at_N, entropies_N.detach().numpy())
            trace = reference.forward(self._uncached.blt, ids, lengths)
            judge.logits(at_N, trace.logits.numpy(), closes_N)

    def sides(self, name: str) -> list[Side]:
        rule = None if name == OWN else self._rows.rules[name]
        return [
            Side(model, rule, lambda how, form=form: self.line(form, how, name))  # type: ignore[misc]
            for form, model in self._models.items()
        ]

    def compare(self, sides: list[Side], name: str, group: list[Job]) -> int:
        """A group of rows through every cached form; the bytes in it."""
        given = self._cut_otherwise(group[-1]) if name == OWN else None
        for side in sides:
            for job in group:
                side.in_chunks(job)
            if given is not None:
                side.in_chunks(*given)
            side.scripts(group, self._rows.random(2, self._jobs))
        self._jobs += len(group)
        for row in [job.row for job in (group if given is None else [*group, given[0]])]:
            ends_P = np.flatnonzero(row.closes_N) + 1
            self._longest_row = max(self._longest_row, len(row))
            self._longest_patch = max(self._longest_patch, int(np.diff(ends_P, prepend=0).max(initial=0)))
        done = sum(job.n_bytes for job in group)
        self._bytes += done
        return done

    def _cut_otherwise(self, job: Job) -> tuple[Job, Ids] | None:
        """The row under given patch lengths, many short patches and a few longer than any chunk."""
        lengths_P = forced_lengths(len(job.row), self._rows.chunk, self._rows.random(3, self._jobs))
        if len(lengths_P) > self._rows.most_patches:
            return None
        return replace(job, row=forced(job.row, lengths_P), where=f"{job.where}, given patches"), lengths_P

    def greedy(self, n: int) -> None:
        """`n` greedy ids behind each prompt, under the own rule."""
        rows, random = self._rows, self._rows.random(4)
        rule = rows.rules[OWN]
        pieces = rows.text(random, rule)
        most = min(rows.most_ids, rows.most_patches) - n - 1
        prompts = [rows.row(take(pieces, min(size, most, rows.row_bytes), bos=True), rule).ids_N for size in PROMPTS]
        wanted = [self._uncached.greedy(prompt, n) for prompt in prompts]
        for side in self.sides(OWN):
            side.greedy(prompts, wanted, lambda ids_N: self._uncached.row(ids_N, rule, rows.tolerance), random)
