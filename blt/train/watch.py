"""Watching a run: how it goes, for people, and its records for TensorBoard.

On a terminal a bar, elsewhere a line every few seconds; only rank 0 says anything, and nothing with -q. What is shown
is the mean since it was last shown: bits per byte, bytes a second, bytes a patch, the share of padding, the time left.
Not here: metrics.jsonl, which is always written (`blt.train.metrics`).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from blt.data.batches import Batch
from blt.train.metrics import Window
from blt_runtime.errors import MissingExtra

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

log = logging.getLogger("blt.train")

LINE_EVERY_S, BAR_EVERY_S = 5.0, 0.5  # how often the numbers change
RECENT_STEPS = 200  # the time left follows the mean of so many; validation and checkpoints are in it
TENSORBOARD = "tensorboard"  # folder within the run


class Watch:
    """One who watches a run, and says nothing."""

    def step(self, step: int, nats: float, batch: Batch) -> None:
        """Called behind each step with its summed loss in nats and the GLOBAL batch."""

    def record(self, record: Mapping[str, Any]) -> str:
        """Called with every record of metrics.jsonl; returns words to put behind it in the log, if any."""
        return ""


class Watches(Watch):
    """Several of them."""

    def __init__(self, watches: list[Watch]):
        self.watches = watches

    def step(self, step: int, nats: float, batch: Batch) -> None:
        for watch in self.watches:
            watch.step(step, nats, batch)

    def record(self, record: Mapping[str, Any]) -> str:
        return "".join(watch.record(record) for watch in self.watches)


@contextmanager
def watching(out: Path, steps: int, at: int, tensorboard: bool = False) -> Iterator[Watch]:
    """The watch over a run in the folder `out` that goes from step `at` to `steps`.

    Raises MissingExtra if TensorBoard is wanted and not installed.
    """
    with ExitStack() as stack:
        watches: list[Watch] = []
        if is_first_rank() and tensorboard:
            watches.append(stack.enter_context(tensorboard_events(out / TENSORBOARD, at)))
        if is_first_rank() and log.isEnabledFor(logging.INFO):
            watches.append(stack.enter_context(_bar(steps, at)) if sys.stderr.isatty() else Lines(steps))
        yield Watches(watches)


def is_first_rank() -> bool:
    """Whether this process is the one of a torchrun that speaks (alone: yes)."""
    return os.environ.get("RANK", "0") in ("", "0")


# --- for people --------------------------------------------------------------------------------------------


class Pace(Watch):
    """Keeps the numbers between two showings, and calls `show` every `every` seconds."""

    def __init__(self, steps: int, every: float):
        self.steps, self.every = steps, every
        self.window = Window()
        self.ends: deque[float] = deque(maxlen=RECENT_STEPS)
        self.shown = time.monotonic()

    def step(self, step: int, nats: float, batch: Batch) -> None:
        self.window.add(nats, batch)
        now = time.monotonic()
        self.ends.append(now)
        if now - self.shown >= self.every or step == self.steps:
            self.show(step, report(self.window.summary(), self.left(step)))
            self.start()

    def record(self, record: Mapping[str, Any]) -> str:
        if "valid_bpb" in record:
            self.start()  # validation's time is not training's
        return ""

    def start(self) -> None:
        """The next showing begins here."""
        self.window.reset()
        self.shown = time.monotonic()

    def left(self, step: int) -> float | None:
        """Seconds to the end of the run; None behind the first step, which compiles, and the last."""
        if len(self.ends) < 2 or step >= self.steps:
            return None
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1) * (self.steps - step)

    def show(self, step: int, numbers: str) -> None:
        """Shows the step and its numbers."""
        raise NotImplementedError


class Lines(Pace):
    """`step 1,200 of 3,000: 1.912 bits/byte, ...` in the log, where no record says as much."""

    def __init__(self, steps: int):
        super().__init__(steps, LINE_EVERY_S)

    def record(self, record: Mapping[str, Any]) -> str:
        self.start()  # the log has just said it all
        left = self.left(record["step"]) if "loss" in record else None
        return "" if left is None else f" left {duration(left)}"

    def show(self, step: int, numbers: str) -> None:
        if step < self.steps:  # the record of the last step follows
            log.info("step %s of %s: %s", f"{step:,}", f"{self.steps:,}", numbers)


def report(summary: Mapping[str, Any], left: float | None) -> str:
    """The numbers of a `Window.summary` in words: `1.912 bits/byte, 12.3 kB/s, 4.51 bytes/patch, ...`."""
    words = [f"{summary['bpb']:.3f} bits/byte", f"{summary['bytes_per_s'] / 1e3:.3g} kB/s"]
    if left is not None:
        words.append(f"{duration(left)} left")  # what a narrow terminal cuts off comes behind it
    if "patch_size" in summary:
        words.append(f"{summary['patch_size']:.2f} bytes/patch")
    words.append(f"padding {summary['padding']:.1%}")
    if "patch_padding" in summary:
        words[-1] += f" of bytes, {summary['patch_padding']:.1%} of patches"
    return ", ".join(words)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`, `3 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


class Bar(Pace):
    """A line that stays at the bottom of the terminal."""

    def __init__(self, steps: int, progress: Progress, task: TaskID):
        super().__init__(steps, BAR_EVERY_S)
        self.progress, self.task = progress, task

    def show(self, step: int, numbers: str) -> None:
        self.progress.update(self.task, completed=step, numbers=numbers)


@contextmanager
def _bar(steps: int, at: int) -> Iterator[Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(file=sys.stderr, highlight=False)
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}", markup=False))
    often = 1 / BAR_EVERY_S
    bar = Progress(*columns, console=console, refresh_per_second=often, redirect_stdout=False, redirect_stderr=False)
    with bar as progress:
        task = progress.add_task("train", total=steps, completed=at, numbers="")
        with _logging_above(console):
            yield Bar(steps, progress, task)


@contextmanager
def _logging_above(console: Console) -> Iterator[None]:
    """While inside, log lines go above the bar; written past it they would leave pieces of it behind."""
    found = [h for h in logging.getLogger("blt").handlers if isinstance(h, logging.StreamHandler)]
    streams = [handler.setStream(cast(TextIO, _Above(console))) for handler in found]
    try:
        yield
    finally:
        for handler, stream in zip(found, streams, strict=True):
            handler.setStream(stream)


class _Above:
    """What a log handler needs of a stream."""

    def __init__(self, console: Console):
        self.console = console

    def write(self, text: str) -> None:
        self.console.print(text, end="", markup=False, soft_wrap=True)

    def flush(self) -> None:
        """Nothing is held back."""


# --- TensorBoard -------------------------------------------------------------------------------------------


class Events(Watch):
    """Every number of every record as a scalar at its step: `train/bpb`, `train/padding`, `valid/bpb`, ..."""

    def __init__(self, writer: Any):
        self.writer = writer

    def record(self, record: Mapping[str, Any]) -> str:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()  # a kill loses nothing that metrics.jsonl has
        return ""


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The names and values of a record's numbers; a dictionary in it (`buckets`) gives one for each key."""
    part, skip = ("valid", ("step", "bytes", "flops")) if "valid_bpb" in record else ("train", ("step",))
    found: dict[str, float] = {}
    for key, value in record.items():
        name = f"{part}/{key.removeprefix('valid_')}"
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": float(number) for inner, number in value.items()}
        elif key not in skip and isinstance(value, int | float):
            found[name] = float(value)
    return found


@contextmanager
def tensorboard_events(folder: Path, at: int) -> Iterator[Events]:
    """Event files in `folder`; TensorBoard drops what they hold behind step `at`, where this run goes on."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("tensorboard (run.tensorboard)", "tensorboard") from error
    writer = SummaryWriter(str(folder), purge_step=at + 1 if at else None)
    try:
        yield Events(writer)
    finally:
        writer.close()
