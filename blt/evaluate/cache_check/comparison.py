"""Candidate against reference: errors against a tolerance, boundaries against decisions, greedy texts.

Error of a vector of logits: max |got - want| / max(1, max |want|), as in the exporter's parity; of an entropy
|got - want| / max(1, |want|). A number that is not finite has an infinite error. If the cached form places a boundary
elsewhere at a near decision, the position counts as moved. The reference then recomputes the row with the cached form's
patches, and the comparison continues. It continues likewise after a wrong boundary, so that one fault is one failure.

Letters: M positions of a segment, S positions compared, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blt.evaluate.cache_check.recorder import Recording, concatenated
from blt.evaluate.cache_check.report import Line
from blt.evaluate.cache_check.scripts import Playback, Segment
from blt.evaluate.cache_check.uncached import Floats, Row, scale
from blt_runtime.ids import Ids
from blt_runtime.patching import Bools, closes_from_lengths


@dataclass
class Comparison:
    """Compares with one row and records the result in one line. `where` begins every failure's message."""

    row: Row
    line: Line
    where: str
    seen_N: Bools = field(init=False)

    def __post_init__(self) -> None:
        self.seen_N = np.zeros(len(self.row), np.bool_)

    def playback(self, playback: Playback) -> None:
        """Everything that a playback computed; it must include every position of the row."""
        for segment in playback.segments:
            self.segment(segment)
        for problem in playback.problems:
            self.line.fail(f"{self.where}: {problem}")
        self.complete()

    def complete(self) -> None:
        """A failure for each position without logits."""
        if missing := np.flatnonzero(~self.seen_N).tolist():
            self.line.fail(f"{self.where}: no logits at position {missing[0]}", len(missing))

    def segment(self, segment: Segment) -> None:
        closes_M = closes_from_lengths(segment.lengths_P)
        if not self.boundaries(closes_M):
            return
        if segment.recording.entropy:
            self.entropies(*concatenated(segment.recording.entropy))
        self.logits(*concatenated(segment.recording.logits), closes_M)

    def boundaries(self, closes_M: Bools) -> bool:
        """False if the segment is longer than its row, so that nothing can be compared."""
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
        """The row is a prompt of `prompt` ids and a candidate's greedy text; `want` is the reference's greedy text.

        Where they diverge, the uncached logits must tie, computed with the candidate's patches in case a near boundary
        has moved. The texts are compared up to there.
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


def compare_playbacks(alone: Playback, interleaved: Playback, line: Line, where: str) -> None:
    """The same script twice: both cached forms must compute the same at each position.

    A rewind on a used stream may replay less, so positions that only one of them recomputed do not count. Segments
    whose boundaries differ at near decisions are left out: both have been compared with the reference.
    """
    if len(alone.segments) != len(interleaved.segments):
        return line.fail(f"{where}: {len(alone.segments)} segments alone, {len(interleaved.segments)} interleaved")
    for first, second in zip(alone.segments, interleaved.segments, strict=True):
        if np.array_equal(first.lengths_P, second.lengths_P):
            _compare_recordings(first.recording, second.recording, line, where)
        else:
            _compare_boundaries(alone.row, (first.lengths_P, second.lengths_P), line, where)
    return None


def _compare_boundaries(row: Row, both: tuple[Ids, Ids], line: Line, where: str) -> None:
    near, wrong = set[int](), set[int]()
    for lengths_P in both:
        near_here, wrong_here = row.moved(closes_from_lengths(lengths_P)[: len(row)])
        near ^= set(near_here)
        wrong ^= set(wrong_here)
    line.moved += len(near)
    if wrong:
        line.fail(f"{where}, position {min(wrong)}: the boundary differs", len(wrong))


def _compare_recordings(first: Recording, second: Recording, line: Line, where: str) -> None:
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
    at_S, values = concatenated(pieces)
    unique_S, from_the_end = np.unique(at_S[::-1], return_index=True)
    return unique_S, values[::-1][from_the_end]
