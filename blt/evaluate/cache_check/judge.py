"""The comparison: errors against a tolerance, boundaries against decisions, greedy text against greedy text.

Error of a vector of logits: max |got - want| / max(1, max |want|), as in the exporter's parity; of an entropy
|got - want| / max(1, |want|). A number that is not finite is infinitely wrong. Where the cached side ends patches
elsewhere at a near decision, the position is counted as moved and the row goes on with the cached side's patches: the
uncached side recomputes it with them. After a wrong boundary it goes on likewise, so that one fault is one failure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blt.evaluate.cache_check.scripts import Run, Settled
from blt.evaluate.cache_check.truth import Floats, Row, scale
from blt.evaluate.cache_check.watch import Taken, joined
from blt_runtime.ids import Ids
from blt_runtime.patching import Bools, closes_from_lengths

TOLERANCE = 2e-5


@dataclass
class Line:
    """One row of the report: `form` computed text in the way `how` under the patch rule `rule`.

    positions: vectors of logits compared.  entropy_error, logit_error: the largest (None: nothing to compare).
    near: positions whose boundary an error within tolerance could move; moved: those where it did.  ties: positions
    whose two largest logits it could exchange; parted: greedy texts that end there.  failures: what no tolerance
    explains.
    """

    form: str
    how: str
    rule: str
    tolerance: float
    positions: int = 0
    entropy_error: float | None = None
    logit_error: float | None = None
    near: int = 0
    moved: int = 0
    ties: int = 0
    parted: int = 0
    failures: int = 0
    first_failure: str | None = None

    def worst(self, name: str, error: float) -> None:
        """Enters an error; the largest stays."""
        setattr(self, name, max(error, getattr(self, name) or 0.0))

    def fail(self, what: str, count: int = 1) -> None:
        self.failures += count
        self.first_failure = self.first_failure or what

    def add(self, other: Line) -> None:
        """Sums and largest errors of both; the first failure stays."""
        for name in ("positions", "near", "moved", "ties", "parted", "failures"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("entropy_error", "logit_error"):
            if (error := getattr(other, name)) is not None:
                self.worst(name, error)
        self.first_failure = self.first_failure or other.first_failure


@dataclass(frozen=True)
class Report:
    """All lines, and what they were measured on: bytes of text in rows, and the seed that makes them again."""

    lines: tuple[Line, ...]
    n_bytes: int
    rows: int
    longest_row: int
    longest_patch: int
    seed: int

    @property
    def ok(self) -> bool:
        return self.failures == 0 and all(line.positions for line in self.lines)

    @property
    def failures(self) -> int:
        return sum(line.failures for line in self.lines)

    def by_how(self) -> list[Line]:
        """The lines with the rules of each form and way summed up, form after form."""
        sums: dict[tuple[str, str], Line] = {}
        for line in self.lines:
            key = (line.form, line.how)
            sums.setdefault(key, Line(line.form, line.how, "all", line.tolerance)).add(line)
        forms = list(dict.fromkeys(form for form, _ in sums))
        return sorted(sums.values(), key=lambda line: forms.index(line.form))


@dataclass
class Judge:
    """Compares with one row and enters what it finds into one line. `where` begins every failure's message."""

    row: Row
    line: Line
    where: str
    seen_N: Bools = field(init=False)

    def __post_init__(self) -> None:
        self.seen_N = np.zeros(len(self.row), np.bool_)

    def run(self, run: Run) -> None:
        """Everything that a run computed; every position must be among it."""
        for stretch in run.settled:
            self.stretch(stretch)
        for what in run.strange:
            self.line.fail(f"{self.where}: {what}")
        self.complete()

    def complete(self) -> None:
        if missing := np.flatnonzero(~self.seen_N).tolist():
            self.line.fail(f"{self.where}: no logits at position {missing[0]}", len(missing))

    def stretch(self, stretch: Settled) -> None:
        closes_M = closes_from_lengths(stretch.lengths_P)
        if not self.boundaries(closes_M):
            return
        if stretch.taken.entropy:
            self.entropies(*joined(stretch.taken.entropy))
        self.logits(*joined(stretch.taken.logits), closes_M)

    def boundaries(self, closes_M: Bools) -> bool:
        """False if the stretch is longer than its row, so that there is nothing to compare it with."""
        if len(closes_M) > len(self.row):
            self.line.fail(f"{self.where}: {len(closes_M)} positions in a row of {len(self.row)}")
            return False
        near, wrong = self.row.moved(closes_M)
        self.line.moved += len(near)
        if wrong:
            self.line.fail(f"{self.where}, position {wrong[0]}: the boundary differs", len(wrong))
        return True

    def entropies(self, at_S: Ids, got_S: Floats) -> None:
        error_S = errors(got_S, self.row.entropies_N[at_S])
        self.line.worst("entropy_error", float(error_S.max(initial=0.0)))
        self._demand("entropy", at_S, error_S)

    def logits(self, at_S: Ids, got_SV: Floats, closes_M: Bools) -> None:
        error_S = errors(got_SV, self.row.logits_under(closes_M)[at_S])
        self.line.worst("logit_error", float(error_S.max(initial=0.0)))
        self.line.positions += len(at_S)
        self.seen_N[at_S] = True
        at = np.unique(at_S)
        self.line.near += int(self.row.near_N[at].sum())
        self.line.ties += int(self.row.tie_N[at].sum())
        self._demand("logits", at_S, error_S)

    def _demand(self, what: str, at_S: Ids, error_S: Floats) -> None:
        if len(bad := np.flatnonzero(~(error_S <= self.row.tolerance))):
            first = bad[0]
            self.line.fail(f"{self.where}, position {at_S[first]}: {what} off by {error_S[first]:.3g}", len(bad))

    def greedy(self, prompt: int, want: list[int], lengths_P: Ids) -> None:
        """The row is a prompt of `prompt` ids and a cached side's greedy text, `want` the uncached side's.

        Where they part, the uncached logits must tie, under the cached side's patches if a near boundary has moved. The
        texts are compared up to there.
        """
        got = self.row.ids_N[prompt:].tolist()
        if len(got) != len(want):
            return self.line.fail(f"{self.where}: {len(got)} greedy ids, not {len(want)}")
        first = next((i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b), None)
        if first is None:
            return None
        at = prompt + first - 1
        logits_1V = self.row.logits_under(closes_from_lengths(lengths_P))[at : at + 1]
        if logits_1V.max() - logits_1V[0, got[first]] <= 2 * self.row.tolerance * scale(logits_1V)[0]:
            self.line.parted += 1
            return None
        return self.line.fail(f"{self.where}: greedy text differs at id {first}: {got[first]}, not {want[first]}")


def errors(got: Floats, want: Floats) -> Any:
    """Error of each entropy [S] or vector of logits [S, V]; infinite for a number that is not finite."""
    difference = np.abs(got - want)
    error_S = (difference if want.ndim == 1 else difference.max(-1)) / scale(want)
    return np.where(np.isfinite(error_S), error_S, np.inf)


def compare_runs(alone: Run, together: Run, line: Line, where: str) -> None:
    """The same script twice: what is computed of a position must agree (both sides are cached).

    A rewind on a stream used before may replay less, so what only one side computed again counts nothing. A stretch
    whose boundaries differ at near decisions is left out: both have been compared with the uncached side.
    """
    if len(alone.settled) != len(together.settled):
        return line.fail(f"{where}: {len(alone.settled)} stretches alone, {len(together.settled)} in company")
    for first, second in zip(alone.settled, together.settled, strict=True):
        if np.array_equal(first.lengths_P, second.lengths_P):
            _compare_taken(first.taken, second.taken, line, where)
        else:
            _compare_boundaries(alone.row, first.lengths_P, second.lengths_P, line, where)
    return None


def _compare_boundaries(row: Row, alone_P: Ids, together_P: Ids, line: Line, where: str) -> None:
    near, wrong = set[int](), set[int]()
    for lengths_P in (alone_P, together_P):
        near_here, wrong_here = row.moved(closes_from_lengths(lengths_P)[: len(row)])
        near ^= set(near_here)
        wrong ^= set(wrong_here)
    line.moved += len(near)
    if wrong:
        line.fail(f"{where}, position {min(wrong)}: the boundary differs", len(wrong))


def _compare_taken(first: Taken, second: Taken, line: Line, where: str) -> None:
    for name, pairs in (("entropy", (first.entropy, second.entropy)), ("logits", (first.logits, second.logits))):
        if not pairs[0] or not pairs[1]:
            continue
        (first_S, want), (second_S, got) = (_latest(pieces) for pieces in pairs)
        at_S, in_first, in_second = np.intersect1d(first_S, second_S, assume_unique=True, return_indices=True)
        error_S = errors(got[in_second], want[in_first])
        line.worst("entropy_error" if name == "entropy" else "logit_error", float(error_S.max(initial=0.0)))
        line.positions += len(at_S) if name == "logits" else 0
        if len(bad := np.flatnonzero(~(error_S <= line.tolerance))):
            line.fail(f"{where}, position {at_S[bad[0]]}: {name} off by {error_S[bad[0]]:.3g}", len(bad))


def _latest(pieces: list[tuple[Ids, Floats]]) -> tuple[Ids, Floats]:
    """Positions in order, each once, with the value computed last."""
    at_S, values = joined(pieces)
    unique_S, from_behind = np.unique(at_S[::-1], return_index=True)
    return unique_S, values[::-1][from_behind]
