"""Output: results to stdout, logs and progress to stderr.

The verbosity is the level of the loggers `blt`, `blt_export` and `blt_runtime`; there is no other state.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.text import Text

from blt_runtime.errors import printable

LOGGERS = ("blt", "blt_export", "blt_runtime")
PROGRESS_EVERY_S = 5.0  # seconds between progress lines where stderr is not a terminal

_UNPRINTABLE = re.compile("[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that `json` leaves as they are and a terminal obeys, or that have no UTF-8."""
log = logging.getLogger("blt.cli")


def plain(text: str) -> str:
    """The text with escape sequences and other control characters shown, except line breaks and tabs.

    Names of files, tensors and keys come from files that somebody else wrote; a terminal would obey them.
    """
    return text if text.isprintable() else re.sub(r"[^\n\t]+", lambda part: printable(part[0]), text)


def say(text: str) -> None:
    """Prints a line on stdout, as `plain` writes it."""
    print(plain(text), flush=True)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


class _Console(Console):
    """Strings in tables are shown as `plain` writes them, and brackets in them are no markup."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **{**options, "markup": False})


def start_logging() -> None:
    """Sends the project's loggers to stderr as plain lines, at level INFO."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
    set_verbosity(0)


def set_verbosity(level: int) -> None:
    """-1: warnings only. 0: progress and information. 1 and more: debugging output and tracebacks."""
    chosen = logging.WARNING if level < 0 else logging.INFO if level == 0 else logging.DEBUG
    for name in LOGGERS:
        logging.getLogger(name).setLevel(chosen)


def verbose() -> bool:
    """True if -v was given."""
    return logging.getLogger("blt").isEnabledFor(logging.DEBUG)


def stdout_console(width: int | None = None) -> Console:
    """A rich console on stdout; colours only on a terminal, and never if NO_COLOR is set."""
    if width is None and not sys.stdout.isatty():
        width = 120  # tables in a pipe or a log file
    return _Console(file=sys.stdout, width=width, highlight=False, soft_wrap=False)


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    raise TypeError(f"no JSON form for {type(value).__name__}")


def print_json(schema: str, payload: dict[str, Any]) -> None:
    """Prints one JSON object on stdout; `schema` is a name with a version, such as "blt.eval/1"."""
    text = json.dumps({"schema": schema, **payload}, default=_plain, ensure_ascii=False, indent=2)
    print(_UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)


def snake_case(parts: Mapping[str, float]) -> dict[str, float]:
    """Names of parts such as "hash tables" as keys of `--json`."""
    return {part.replace(" ", "_"): value for part, value in parts.items()}


def print_tree(report: Mapping[str, Any], indent: int = 0) -> None:
    """Prints nested values on stdout as indented `name  value` lines, numbers as `number` writes them."""
    width = max((len(str(key)) for key in report), default=0)
    for key, value in report.items():
        if isinstance(value, Mapping):
            say(f"{' ' * indent}{key}")
            print_tree(value, indent + 2)
        else:
            say(f"{' ' * indent}{key!s:<{width}}  {number(value)}")


def number(value: object) -> str:
    """Whole numbers with thousands separators, fractions with four digits, other values unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def to_stderr(line: str) -> None:
    """Prints a line that an option requests on stderr; -q does not hide it."""
    print(plain(line), file=sys.stderr, flush=True)


class Advance(Protocol):
    """Called with the number of units done since the last call."""

    def __call__(self, units: float = 1) -> None: ...


@contextmanager
def progress(label: str, total: float) -> Iterator[Advance]:
    """The share that is done and the time left: a bar if stderr is a terminal, else a line every few seconds.

    Nothing is shown with -q, or on ranks above 0. total: units of the whole work.
    """
    if not _shows_progress():
        yield lambda units=1: None
    elif sys.stderr.isatty():
        yield from _bar(label, total)
    else:
        yield _Lines(label, total)


@contextmanager
def named_steps(label: str, total: int) -> Iterator[Callable[[str], None]]:
    """Call the result with the name of each of `total` steps when it begins: one line on a terminal, else a line every
    few seconds. Steps differ too much in length for a time left. With -q nothing is shown.
    """
    if not _shows_progress():
        yield lambda name: None
    elif sys.stderr.isatty():
        with Console(file=sys.stderr, highlight=False).status(label) as status:
            counter = itertools.count(1)
            yield lambda name: status.update(f"{label}: step {next(counter)} of {total}, {name}")
    else:
        yield _StepLines(label, total)


def _shows_progress() -> bool:
    return log.isEnabledFor(logging.INFO) and os.environ.get("RANK", "0") in ("", "0")


def _bar(label: str, total: float) -> Iterator[Advance]:
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=Console(file=sys.stderr, highlight=False), transient=True) as bar:
        task = bar.add_task(label, total=total, state="")
        rate = _Rate(total)

        def advance(units: float = 1) -> None:
            rate.add(units)
            bar.update(task, completed=rate.done, state=rate.state())

        yield advance


class _Rate:
    """The share of the work that is done, and the time left at the mean speed so far."""

    def __init__(self, total: float) -> None:
        self.total, self.done, self.started = total, 0.0, time.monotonic()

    def add(self, units: float) -> None:
        self.done += units

    def state(self) -> str:
        """`40 %, 12 s left`."""
        from blt.data.quantities import duration

        share = f"{100 * self.done / self.total:.0f} %"
        if not 0 < self.done < self.total:
            return share
        return f"{share}, {duration((time.monotonic() - self.started) * (self.total / self.done - 1))} left"


class _Lines:
    """Progress for log files: `label 40 %, 12 s left`."""

    def __init__(self, label: str, total: float) -> None:
        self.label, self.rate, self.printed = label, _Rate(total), time.monotonic()

    def __call__(self, units: float = 1) -> None:
        self.rate.add(units)
        now = time.monotonic()
        if now - self.printed >= PROGRESS_EVERY_S:
            self.printed = now
            log.info("%s %s", self.label, self.rate.state())


class _StepLines:
    """Progress for log files: `export: step 3 of 25, fold weights`."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.begun, self.printed = label, total, 0, time.monotonic()

    def __call__(self, name: str) -> None:
        self.begun += 1
        now = time.monotonic()
        if now - self.printed >= PROGRESS_EVERY_S:
            self.printed = now
            log.info("%s: step %d of %d, %s", self.label, self.begun, self.total, name)
