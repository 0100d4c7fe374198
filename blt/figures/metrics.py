"""What runs have written down: the curves in `metrics.jsonl`, read back for figures and comparisons.

A record of training has `loss` (nats per target) and `bpb`, one of validation `valid_bpb`; both have `step`, `bytes`
and `flops`, which count from the start of the run. A validation record that lacks one of them takes it from the
training record of its step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blt_runtime import reading
from blt_runtime.errors import InputError, UsageError

FILE = "metrics.jsonl"
COUNTS = ("bytes", "flops", "seconds")  # totals that a validation record may share with its training record

Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run: its records in the order of the steps."""

    label: str
    path: Path
    train: Sequence[Record]
    valid: Sequence[Record]

    def points(self, y: str, x: str, least_bytes: float = 0) -> list[tuple[float, float]]:
        """(x, y) of every record after `least_bytes` bytes that has both, as numbers above 0 (for log axes)."""
        records = self.valid if y.startswith("valid") else self.train
        late = (record for record in records if record.get("bytes", math.inf) >= least_bytes)
        pairs = ((_number(record.get(x)), _number(record.get(y))) for record in late)
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    def summary(self) -> Record:
        """Where the run stands: steps, bytes, FLOPs, the last bits per byte in training, last and best validated."""
        last = max([*self.train[-1:], *self.valid[-1:]], key=lambda record: record["step"])
        validated = [y for _, y in self.points("valid_bpb", "step")]
        return {
            "label": self.label,
            "path": str(self.path),
            "steps": last["step"],
            "bytes": last.get("bytes"),
            "flops": last.get("flops"),
            "seconds": last.get("seconds"),
            "bpb": self.train[-1].get("bpb") if self.train else None,
            "valid_bpb": validated[-1] if validated else None,
            "best_valid_bpb": min(validated, default=None),
        }


def read_runs(paths: Sequence[Path], labels: Sequence[str] | None = None) -> list[Run]:
    """The runs in folders (or metrics files), labelled by `labels`, else by what tells their paths apart.

    Raises UsageError for labels that do not match the paths, InputError for what is no run or has no records.
    """
    if labels is None:
        labels = distinct([path.parent if path.name == FILE else path for path in paths])
    if len(labels) != len(paths):
        raise UsageError(f"{len(labels)} labels for {len(paths)} runs; give one for each")
    return [read_run(path, label) for path, label in zip(paths, labels, strict=True)]


def read_run(path: Path, label: str) -> Run:
    """One run. A last line that a kill left half-written is left out; any other broken line is an InputError."""
    file = path / FILE if path.is_dir() else path
    try:
        lines = reading.read_text(file, reading.LARGEST_LOG).splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no {FILE} can be read there; name the folder of a run") from error
    records = [record for n, line in enumerate(lines, 1) if (record := _parsed(file, n, line, n == len(lines)))]
    train = [record for record in records if "loss" in record]
    by_step = {record["step"]: record for record in train}
    valid = [_shared(by_step.get(record["step"], {})) | record for record in records if "valid_bpb" in record]
    if not train and not valid:
        raise InputError(f"{file} has no records of training; let the run get to its first log line")
    return Run(label, path, train, valid)


def _shared(record: Record) -> Record:
    return {name: record[name] for name in COUNTS if name in record}


def _parsed(file: Path, number: int, line: str, last: bool) -> Record | None:
    try:
        record = reading.parse_json(line, finite=False)
    except ValueError:
        record = None
    if isinstance(record, dict) and isinstance(record.get("step"), int):
        return record
    if last:
        return None
    raise InputError(f"{file}: line {number} is no record of a run; restore the file, or name another run")


def _number(value: object) -> float | None:
    """A finite number above 0, else None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return float(value) if good else None  # type: ignore[arg-type]


def distinct(paths: Iterable[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other; the same path twice gets a number."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max((len(p) for p in parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            break
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        names[i] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names
