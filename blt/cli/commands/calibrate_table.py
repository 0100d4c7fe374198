"""The result of `blt calibrate`: the rows of its table, and their output as text and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from blt.evaluate import costs
from blt_runtime.patching import PatchRule

if TYPE_CHECKING:
    from blt.data.threshold import Sizes


@dataclass(frozen=True)
class Row:
    """One rule: the mean it was chosen for (None: the model's own rule), its patches on held-out text, its cost."""

    wanted: float | None
    rule: PatchRule
    sizes: Sizes
    bits_per_byte: float | None = None
    bytes_per_s: float | None = None

    def report(self) -> dict[str, Any]:
        """The row of `--json`."""
        return {
            "wanted_mean_patch": self.wanted,
            "rule": self.rule.to_dict(),
            "threshold": self.rule.threshold if self.rule.needs_entropy else None,
            "mean_patch": round(self.sizes.mean, 4),
            "p50": self.sizes.percentile(50),
            "p95": self.sizes.percentile(95),
            "bits_per_byte": None if self.bits_per_byte is None else round(self.bits_per_byte, 5),
            "bytes_per_s": None if self.bytes_per_s is None else round(self.bytes_per_s, 1),
        }


@dataclass(frozen=True)
class Cost:
    """How bits per byte and speed were measured."""

    scored_bytes: int
    times: costs.Times | None
    backend: str

    def report(self) -> dict[str, Any]:
        times = self.times and {
            "seconds_per_byte": round(self.times.per_byte, 7),
            "seconds_per_patch": round(self.times.per_patch, 7),
            "steps": self.times.steps,
        }
        return {"scored_bytes": self.scored_bytes, "backend": self.backend, "times": times}


@dataclass(frozen=True, kw_only=True)
class Result:
    """The chosen rule, its patches on the text it was chosen on and on held-out text, and the table. `cost` is None
    for an entropy model without a BLT."""

    wanted: float
    tolerance: float
    rule: PatchRule
    chosen_on: Sizes
    held_out: Sizes
    rows: list[Row]
    unreachable: list[float]
    cost: Cost | None

    def sorted_rows(self) -> list[Row]:
        """By mean patch size, the shortest first."""
        return sorted(self.rows, key=lambda row: row.sizes.mean)

    @property
    def problem(self) -> str | None:
        """Why the wanted mean is missed; None if it is met."""
        from blt.data.threshold import relative_error

        share = f"more than {100 * self.tolerance:g} % from the wanted {self.wanted:g}"
        if relative_error(self.chosen_on.mean, self.wanted) > self.tolerance:
            return (
                f"the closest threshold gives {self.chosen_on.mean:.3f} bytes per patch, {share}: "
                "the text is too short or its entropies too coarse; give more text or a larger --tolerance"
            )
        if relative_error(self.held_out.mean, self.wanted) > self.tolerance:
            return (
                f"threshold {self.rule.threshold} gives {self.chosen_on.mean:.3f} bytes per patch on the text it was "
                f"chosen on and {self.held_out.mean:.3f} on held-out text, {share}: the text varies too much; "
                "give more text (--bytes) or a larger --tolerance"
            )
        return None


def form(rule: PatchRule) -> str:
    """The kind of the rule: its scheme, or for entropies what the threshold is compared with."""
    if not rule.needs_entropy:
        return rule.scheme
    return "monotonic" if rule.monotonic else "global" if rule.threshold_add is None else "global and rise"


def mark(row: Row, result: Result) -> str:
    """The last column: which row is the wanted one or the model's own rule; empty for the others."""
    if row.wanted is None:
        return f"the model's own rule ({form(row.rule)})"
    return "wanted" if row.wanted == result.wanted else ""


def table(result: Result) -> Table:
    """The rows as a table."""
    out = Table(box=None, pad_edge=False)
    for name in ("threshold", "bytes/patch", "p50", "p95", "bits/byte", "bytes/s"):
        out.add_column(name, justify="right")
    out.add_column("")
    for row in result.sorted_rows():
        r = row.report()
        out.add_row(
            "-" if r["threshold"] is None else f"{r['threshold']:.9g}",
            f"{r['mean_patch']:.3f}",
            str(r["p50"]),
            str(r["p95"]),
            "-" if r["bits_per_byte"] is None else f"{r['bits_per_byte']:.4f}",
            "-" if r["bytes_per_s"] is None else f"{r['bytes_per_s']:,.0f}",
            mark(row, result),
        )
    return out


def notes(result: Result, written: Path | None) -> list[str]:
    """The meaning of the columns and the result, one line each."""
    lines = _how(result.cost) if result.cost is not None else []
    if result.unreachable:
        means = ", ".join(f"{mean:g}" for mean in result.unreachable)
        lines.append(f"No threshold gives patches of {means} bytes on this text.")
    rule, off = result.rule, 100 * (result.held_out.mean / result.wanted - 1)
    lines.append(
        f"threshold {rule.threshold} ({form(rule)}): {result.held_out.mean:.3f} bytes per patch on "
        f"{result.held_out.n_bytes:,} held-out bytes ({off:+.2f} % of {result.wanted:g}), "
        f"{result.chosen_on.mean:.3f} on the {result.chosen_on.n_bytes:,} bytes it was chosen on"
    )
    return ["", *lines, *([f"{written} written with this threshold"] if written else [])]


def _how(cost: Cost) -> list[str]:
    """How the columns of costs were measured."""
    lines = []
    if cost.scored_bytes:
        lines.append(
            f"bits/byte: {cost.scored_bytes:,} held-out bytes, the same weights under every rule. A BLT trained with "
            "one threshold does worse under another; its result after training with that one is not measured here."
        )
    if cost.times is not None:
        lines.append(
            f"bytes/s: expected when generating on this machine ({cost.backend}, one stream): "
            f"{1000 * cost.times.per_byte:.2f} ms per byte + {1000 * cost.times.per_patch:.2f} ms per patch, "
            f"medians of {cost.times.steps} steps"
        )
    return lines


def report(result: Result, written: Path | None) -> dict[str, Any]:
    """The object of `--json`."""
    return {
        "wanted_mean_patch": result.wanted,
        "threshold": result.rule.threshold,
        "rule": result.rule.to_dict(),
        "chosen_on": {"bytes": result.chosen_on.n_bytes, "mean_patch": round(result.chosen_on.mean, 4)},
        "held_out": {"bytes": result.held_out.n_bytes, "mean_patch": round(result.held_out.mean, 4)},
        "tolerance": result.tolerance,
        "within_tolerance": result.problem is None,
        "table": [row.report() for row in result.sorted_rows()],
        "unreachable": result.unreachable,
        "cost": result.cost and result.cost.report(),
        "output": written,
    }
