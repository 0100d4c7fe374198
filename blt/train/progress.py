"""Observers of a run: progress for people, and records for TensorBoard.

Every record is a log line. Between records, progress is a bar on a terminal, and elsewhere a log line every few
seconds, in the same words and units (`fields`). Only rank 0 reports, and nothing is shown with -q. The numbers are
means since they were last shown. Not here: metrics.jsonl, which is always written (`blt.train.metrics`).
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
from blt.data.quantities import amount, count, duration
from blt.train.metrics import MetricWindow
from blt_runtime.errors import MissingExtra

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, TaskID

log = logging.getLogger("blt.train")

LINE_EVERY_S, BAR_EVERY_S = 5.0, 0.5
"""Seconds between two updates of the numbers."""
RECENT_STEPS = 200
"""The time left follows the mean duration of so many steps, validation and checkpoints included."""
FEW_GROUPS = 6
"""A line of validation has the bits per byte of at most so many groups; metrics.jsonl has those of all."""
TEXTS = ("counter", "numbers")
BAR_COLUMNS, WIDE = 20, 100
"""Columns of the bar, and of a terminal that has room for it."""
TENSORBOARD = "tensorboard"
"""Folder within the run."""


class Observer:
    """Receives every step and every record of a run. This one does nothing."""

    def step(self, step: int, nats: float, batch: Batch) -> None:
        """Called after each step with its summed loss in nats and the GLOBAL batch."""

    def record(self, record: Mapping[str, Any]) -> None:
        """Called with every record of metrics.jsonl."""


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, observers: list[Observer]):
        self.observers = observers

    def step(self, step: int, nats: float, batch: Batch) -> None:
        for observer in self.observers:
            observer.step(step, nats, batch)

    def record(self, record: Mapping[str, Any]) -> None:
        for observer in self.observers:
            observer.record(record)


@contextmanager
def observing(out: Path, steps: int, at: int, tensorboard: bool = False) -> Iterator[Observer]:
    """The observer of a run in the folder `out` that goes from step `at` to `steps`.

    Raises MissingExtra if TensorBoard is wanted and not installed.
    """
    with ExitStack() as stack:
        observers: list[Observer] = []
        if is_first_rank() and tensorboard:
            observers.append(stack.enter_context(tensorboard_events(out / TENSORBOARD, at)))
        if is_first_rank() and log.isEnabledFor(logging.INFO):
            bar = sys.stderr.isatty()
            observers.append(stack.enter_context(_progress_bar(steps, at)) if bar else ProgressLines(steps))
        yield Observers(observers)


def is_first_rank() -> bool:
    """Whether this process is rank 0 of a torchrun, or the only process."""
    return os.environ.get("RANK", "0") in ("", "0")


# --- for people --------------------------------------------------------------------------------------------


class ProgressObserver(Observer):
    """Logs every record. Sums the numbers since they were last shown, and calls `show` every `every` seconds."""

    def __init__(self, steps: int, every: float):
        self.steps, self.every = steps, every
        self.window = MetricWindow()
        self.ends: deque[float] = deque(maxlen=RECENT_STEPS)
        self.shown = time.monotonic()

    def step(self, step: int, nats: float, batch: Batch) -> None:
        self.window.add(nats, batch)
        now = time.monotonic()
        self.ends.append(now)
        if now - self.shown >= self.every or step == self.steps:
            self.show(step, fields(self.window.summary(), self.left(step)))
            self.start()

    def record(self, record: Mapping[str, Any]) -> None:
        if "spike_step" in record:  # a warning says it
            return
        step = record["step"]
        log.info("%s: %s", counter(step, self.steps), ", ".join(fields(record, self.left(step))))
        if "valid_bpb" in record:
            self.start()  # the time of validation is not training time

    def start(self) -> None:
        """Starts a new window."""
        self.window.reset()
        self.shown = time.monotonic()

    def left(self, step: int) -> float | None:
        """Seconds to the end of the run; None after the first step, which compiles, and after the last."""
        if len(self.ends) < 2 or step >= self.steps:
            return None
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1) * (self.steps - step)

    def show(self, step: int, numbers: list[str]) -> None:
        """Shows the step and its numbers."""
        raise NotImplementedError


class ProgressLines(ProgressObserver):
    """Log lines such as `step 1,200 of 3,000: 1.912 bits/byte, ...`, unless a record was just logged."""

    def __init__(self, steps: int):
        super().__init__(steps, LINE_EVERY_S)

    def record(self, record: Mapping[str, Any]) -> None:
        super().record(record)
        self.start()  # the line of the record has the same numbers

    def show(self, step: int, numbers: list[str]) -> None:
        if step < self.steps:  # the record of the last step follows
            log.info("%s: %s", counter(step, self.steps), ", ".join(numbers))


def counter(step: int, steps: int) -> str:
    """`step 1,200 of 3,000`."""
    return f"step {step:,} of {steps:,}"


def fields(record: Mapping[str, Any], left: float | None = None) -> list[str]:
    """A record of metrics.jsonl or a `MetricWindow.summary` in words, the most important first.

    left: seconds to the end of the run, if known.
    """
    if "valid_bpb" in record:
        groups = record.get("valid_bpb_by_group", {})
        each = [f"{group} {bits:.3f}" for group, bits in groups.items()] if len(groups) <= FEW_GROUPS else []
        averaged = " of averaged weights" if record.get("valid_weights") == "ema" else ""
        return [
            f"validation {record['valid_bpb']:.3f} bits/byte{averaged}",
            f"{amount(record['valid_bytes'])} of text",
            *each,
        ]
    words = []
    if "bpb" in record:
        words.append(f"{record['bpb']:.3f} bits/byte")
    if left is not None:
        words.append(f"{duration(left)} left")
    if "bytes_per_s" in record:
        words.append(f"{amount(record['bytes_per_s'])}/s")
    if "mfu" in record:
        words.append(f"{record['mfu']:.1%} MFU")
    elif "flops_per_s" in record:
        words.append(f"{count(record['flops_per_s'])}FLOP/s")
    if "patch_size" in record:
        words.append(f"{record['patch_size']:.2f} bytes/patch")
    if "padding" in record:
        words.append(f"padding {record['padding']:.1%}")
    if "patch_padding" in record:
        words[-1] += f" of bytes, {record['patch_padding']:.1%} of patches"
    if "lr" in record:
        words.append(f"learning rate {record['lr']:.3g}")
        words.append(f"gradient norm {record['norm']:.3g}")
    if "memory_bytes" in record:
        words.append(f"memory {amount(record['memory_bytes'])}")
    if "data_wait" in record:
        words.append(f"waits {record['data_wait']:.1%} for data")
    if "update_ratio" in record:
        words.append("update / weight " + ", ".join(f"{part} {x:.2g}" for part, x in record["update_ratio"].items()))
    if "skipped" in record:
        words.append(f"{record['skipped']:,} steps skipped")
    return words


class ProgressBar(ProgressObserver):
    """A line that stays at the bottom of the terminal. A narrow one shows fewer numbers, and no bar; the counter stays.

    bar: columns of the bar, 0 without one.
    """

    def __init__(self, steps: int, progress: Progress, task: TaskID, bar: int):
        super().__init__(steps, BAR_EVERY_S)
        self.progress, self.task, self.bar = progress, task, bar

    def show(self, step: int, numbers: list[str]) -> None:
        shown = counter(step, self.steps)
        room = self.progress.console.width - len(shown) - (self.bar + 1 if self.bar else 0) - 1
        self.progress.update(self.task, completed=step, counter=shown, numbers=fitting(numbers, room))


def fitting(numbers: list[str], room: int) -> str:
    """The first numbers that fit into `room` columns, separated by commas."""
    found = ""
    for number in numbers:
        longer = f"{found}, {number}" if found else number
        if len(longer) > room:
            break
        found = longer
    return found


@contextmanager
def _progress_bar(steps: int, at: int) -> Iterator[ProgressBar]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(file=sys.stderr, highlight=False)
    width = BAR_COLUMNS if console.width >= WIDE else 0
    columns: list[ProgressColumn] = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in TEXTS]
    if width:
        columns.insert(1, BarColumn(bar_width=width))
    bar = Progress(
        *columns, console=console, refresh_per_second=1 / BAR_EVERY_S, redirect_stdout=False, redirect_stderr=False
    )
    with bar as progress:
        task = progress.add_task("train", total=steps, completed=at, counter=counter(at, steps), numbers="")
        with _logging_above(console):
            yield ProgressBar(steps, progress=progress, task=task, bar=width)


@contextmanager
def _logging_above(console: Console) -> Iterator[None]:
    """Prints log lines above the bar while inside. Written to the stream directly, they would leave pieces of it."""
    found = [h for h in logging.getLogger("blt").handlers if isinstance(h, logging.StreamHandler)]
    streams = [handler.setStream(cast(TextIO, _ConsoleStream(console))) for handler in found]
    try:
        yield
    finally:
        for handler, stream in zip(found, streams, strict=True):
            handler.setStream(stream)


class _ConsoleStream:
    """The stream methods that a log handler calls."""

    def __init__(self, console: Console):
        self.console = console

    def write(self, text: str) -> None:
        self.console.print(text, end="", markup=False, soft_wrap=True)

    def flush(self) -> None:
        """The console does not buffer."""


# --- TensorBoard -------------------------------------------------------------------------------------------


class TensorBoardEvents(Observer):
    """Writes every number of every record as a scalar at its step: `train/bpb`, `train/padding`, `valid/bpb`, ..."""

    def __init__(self, writer: Any):
        self.writer = writer

    def record(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()  # so that a kill loses nothing that metrics.jsonl has


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
def tensorboard_events(folder: Path, at: int) -> Iterator[TensorBoardEvents]:
    """Event files in `folder`. TensorBoard drops older events after step `at`, from which this run continues."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("tensorboard (run.tensorboard)", "tensorboard") from error
    writer = SummaryWriter(str(folder), purge_step=at + 1 if at else None)
    try:
        yield TensorBoardEvents(writer)
    finally:
        writer.close()
