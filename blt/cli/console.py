"""Output: results to stdout, logs and progress to stderr.

The verbosity is the level of the loggers `blt`, `blt_export` and `blt_runtime`; there is no other state.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console

LOGGERS = ("blt", "blt_export", "blt_runtime")
PROGRESS_EVERY_S = 5.0  # seconds between progress lines where stderr is not a terminal

log = logging.getLogger("blt.cli")


def start_logging() -> None:
    """Sends the project's loggers to stderr as plain lines, at level INFO."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
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
    return Console(file=sys.stdout, width=width, highlight=False, soft_wrap=False)


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
    print(text, flush=True)


def print_tree(report: Mapping[str, Any], indent: int = 0) -> None:
    """Prints nested values on stdout as indented `name  value` lines, numbers as `number` writes them."""
    width = max((len(str(key)) for key in report), default=0)
    for key, value in report.items():
        if isinstance(value, Mapping):
            print(f"{' ' * indent}{key}")
            print_tree(value, indent + 2)
        else:
            print(f"{' ' * indent}{key!s:<{width}}  {number(value)}")


def number(value: object) -> str:
    """Whole numbers with thousands separators, fractions with four digits, other values unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def to_stderr(line: str) -> None:
    """Prints a line that an option requests on stderr; -q does not hide it."""
    print(line, file=sys.stderr, flush=True)


class Advance(Protocol):
    """Called with the number of units done since the last call."""

    def __call__(self, units: float = 1) -> None: ...


@contextmanager
def progress(label: str, total: float | None) -> Iterator[Advance]:
    """A bar if stderr is a terminal, else a line every few seconds; nothing with -q, or on ranks above 0.

    total: units of the whole work; None if unknown.
    """
    if not log.isEnabledFor(logging.INFO) or os.environ.get("RANK", "0") != "0":
        yield lambda units=1: None
    elif sys.stderr.isatty():
        yield from _bar(label, total)
    else:
        yield _Lines(label, total)


def _bar(label: str, total: float | None) -> Iterator[Advance]:
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda units=1: bar.advance(task, units)


class _Lines:
    """Progress for log files: `label 40 % (12 s)`."""

    def __init__(self, label: str, total: float | None) -> None:
        self.label, self.total, self.done = label, total, 0.0
        self.started = self.printed = time.monotonic()

    def __call__(self, units: float = 1) -> None:
        self.done += units
        now = time.monotonic()
        if now - self.printed < PROGRESS_EVERY_S:
            return
        self.printed = now
        share = f"{100 * self.done / self.total:.0f} %" if self.total else f"{self.done:.0f}"
        log.info("%s %s (%.0f s)", self.label, share, now - self.started)
