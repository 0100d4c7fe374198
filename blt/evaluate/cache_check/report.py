"""The lines that `blt check` prints, and their sums."""

from __future__ import annotations

from dataclasses import dataclass

TOLERANCE = 2e-5


@dataclass
class Line:
    """One line of the report: `form` computed text in the way `how` under the patch rule `rule`.

    positions: vectors of logits compared.  entropy_error, logit_error: the largest (None: nothing to compare).
    near: positions whose boundary an error within tolerance could move; moved: those where it did.  ties: positions
    whose two largest logits it could exchange; parted: greedy texts that diverge at a tie.  failures: differences that
    no tolerance explains.
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
        """Keep the larger of `error` and the error recorded under `name`."""
        setattr(self, name, max(error, getattr(self, name) or 0.0))

    def fail(self, what: str, count: int = 1) -> None:
        self.failures += count
        self.first_failure = self.first_failure or what

    def add(self, other: Line) -> None:
        """Add the counts of `other`, keep the larger errors and the earlier failure."""
        for name in ("positions", "near", "moved", "ties", "parted", "failures"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("entropy_error", "logit_error"):
            if (error := getattr(other, name)) is not None:
                self.worst(name, error)
        self.first_failure = self.first_failure or other.first_failure


@dataclass(frozen=True)
class Report:
    """All lines, and what they were measured on: bytes of text in rows, and the seed that reproduces them."""

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
        """One line per form and way, summed over the patch rules, in the order of the forms."""
        sums: dict[tuple[str, str], Line] = {}
        for line in self.lines:
            key = (line.form, line.how)
            sums.setdefault(key, Line(line.form, line.how, "all", tolerance=line.tolerance)).add(line)
        forms = list(dict.fromkeys(form for form, _ in sums))
        return sorted(sums.values(), key=lambda line: forms.index(line.form))
