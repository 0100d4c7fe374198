"""`blt eval --suite`: noise and tasks about characters, as tables or JSON.

Not here: the measurements (`blt.evaluate.noise`, `blt.evaluate.characters`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from blt.cli import console
from blt.evaluate import texts
from blt_runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    from blt.evaluate.characters import Result
    from blt.evaluate.noise import Line
    from blt.evaluate.scoring import Scorer

SUITES = ("noise", "characters", "all")
PAIR_BYTES = 256  # bytes of a prompt, and of a completion, at most
ROOM = 5  # capacity in pair sizes: a prompt and a completion, each doubled by antspeak, and a margin
N_IDS = ROOM * PAIR_BYTES + 2  # capacity of a model without a fixed one; the longest question has about 250 bytes


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The suites to run: `items` pairs of text for noise, and `items` questions for each task about characters.

    Raises UsageError for an unknown suite, and for noise without data.
    """

    suite: str
    items: int
    seed: int
    data: Path | None
    split: str
    limit: int | None

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise UsageError(f"--suite {self.suite}: choose from {', '.join(SUITES)}")
        if self.has("noise") and self.data is None:
            raise UsageError(f"--suite {self.suite} adds noise to text: name DATA, or use --suite characters")

    def has(self, suite: str) -> bool:
        """Whether this suite runs."""
        return self.suite in (suite, "all")


def run(scorer: Scorer, chosen: Chosen, as_json: bool) -> None:
    """Runs the chosen suites and prints the results. Raises InputError for data without enough text."""
    report: dict[str, Any] = {"suite": chosen.suite, "seed": chosen.seed}
    tables = []
    if chosen.has("noise"):
        size = _pair_bytes(scorer.capacity)
        lines = _noise(scorer, chosen, size)
        pairs = len(lines[0].worse)
        report["noise"] = {"pairs": pairs, "pair_bytes": size, "lines": [_line_report(line) for line in lines]}
        tables.append(_noise_table(lines, f"{pairs:,} pairs, prompt and completion of up to {size} bytes each"))
    if chosen.has("characters"):
        results = _characters(scorer, chosen)
        report["characters"] = {"items": chosen.items, "tasks": [_task_report(result) for result in results]}
        tables.append(_character_table(results))
    if as_json:
        console.print_json("blt.suite/1", report)
        return
    for i, table in enumerate(tables):
        if i:
            print(flush=True)
        console.stdout_console().print(table)


def _pair_bytes(capacity: int | None) -> int:
    """Bytes of a prompt, and of a completion. Raises UsageError if the model's capacity is too small."""
    from blt.evaluate.noise import LEAST

    size = PAIR_BYTES if capacity is None else min(PAIR_BYTES, capacity // ROOM)
    if size < LEAST:
        raise UsageError(f"the model reads {capacity} bytes at once, the noise suite needs {ROOM * LEAST} or more")
    return size


def _noise(scorer: Scorer, chosen: Chosen, size: int) -> list[Line]:
    from blt.evaluate.noise import fitting, measure, pairs

    assert chosen.data is not None
    documents = texts.limited(texts.documents(chosen.data, chosen.split), chosen.limit)
    found = pairs((document.text for document in documents), size, chosen.items)
    if scorer.capacity is not None:
        found = fitting(found, scorer.capacity, chosen.seed)
    if not found:
        raise InputError(
            f"{chosen.data}: no document of {size + size // 2} bytes or more; the noise suite needs longer text"
        )
    with console.progress("noise", len(found)) as advance:
        return measure(scorer.bits, found, seed=chosen.seed, done=advance)


def _characters(scorer: Scorer, chosen: Chosen) -> list[Result]:
    from blt.evaluate.characters import TASKS, items, measure

    found = {task: items(task, chosen.items, chosen.seed) for task in TASKS}
    longest = max(len(item.prompt) + len(item.options[0]) for questions in found.values() for item in questions)
    if scorer.capacity is not None and longest > scorer.capacity:
        raise UsageError(f"the model reads {scorer.capacity} bytes at once, questions about characters have {longest}")
    with console.progress("characters", len(TASKS) * chosen.items) as advance:
        return [measure(scorer.bits, task, questions, done=advance) for task, questions in found.items()]


def _line_report(line: Line) -> dict[str, Any]:
    return {
        "recipe": line.recipe,
        "noise_in": line.where or None,
        "bits_per_byte": round(line.bits_per_byte, 5),
        "bits_per_clean_byte": round(line.bits_per_clean_byte, 5),
        "rise": round(line.rise, 5),
        "rise_standard_error": round(line.error, 5),
        "bytes": line.n_bytes,
        "clean_bytes": line.n_clean,
    }


def _task_report(result: Result) -> dict[str, Any]:
    return {
        "task": result.task,
        "accuracy": round(result.accuracy, 5),
        "standard_error": round(result.error, 5),
        "chance": result.chance,
        "right": result.right,
        "items": result.n,
    }


def _noise_table(lines: list[Line], caption: str) -> Table:
    table = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
    for name in ("recipe", "noise in", "bits/byte", "bits/clean byte", "rise", "±"):
        table.add_column(name, justify="left" if name in ("recipe", "noise in") else "right")
    for line in lines:
        rise = (f"{line.rise:+.4f}", f"{line.error:.4f}") if line.where else ("", "")
        costs = (f"{line.bits_per_byte:.4f}", f"{line.bits_per_clean_byte:.4f}")
        table.add_row(line.recipe, line.where, *costs, *rise)
    return table


def _character_table(results: list[Result]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("task", "accuracy", "±", "chance", "items"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for result in results:
        shares = (f"{share:.1%}" for share in (result.accuracy, result.error, result.chance))
        table.add_row(result.task, *shares, f"{result.n:,}")
    return table
