"""metrics.jsonl (one object per line) and the log line for people.

Rates are means over the steps since the last line, also across a stop. On resume, lines behind the
checkpoint's step are cut off, so that the file reads like that of an uninterrupted run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blt.data.packing import Batch

log = logging.getLogger("blt.train")


class Window:
    """Sums over the steps since the last log line."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.nats = self.seconds = 0.0
        self.targets = self.bytes = self.patches = self.places = self.padding = 0
        self.start()

    def start(self) -> None:
        """The clock runs from here, on top of the seconds that were restored."""
        self.began = time.monotonic() - self.seconds

    def state(self) -> dict[str, float]:
        """The sums and the seconds so far."""
        sums = {name: value for name, value in vars(self).items() if name != "began"}
        return sums | {"seconds": time.monotonic() - self.began}

    def restore(self, state: dict[str, float]) -> None:
        """Goes on from a `state`; an empty one is that of a new window."""
        self.reset()
        vars(self).update(state)
        self.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        before = time.monotonic()
        yield
        self.began += time.monotonic() - before

    def add(self, nats: float, batch: Batch) -> None:
        self.nats += nats
        self.targets += int(batch.mask.sum())
        self.bytes += batch.n_bytes
        self.patches += batch.n_patches
        self.places += batch.mask.size
        self.padding += batch.padding

    def summary(self) -> dict[str, float]:
        """Loss in nats per target, bits per byte, bytes a second, bytes a patch, share of places that are padding."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        rates = {
            "loss": self.nats / max(1, self.targets),
            "bpb": self.nats / math.log(2) / max(1, self.bytes),
            "bytes_per_s": self.bytes / seconds,
            "padding": self.padding / max(1, self.places),
        }
        return rates | ({"patch_size": self.targets / self.patches} if self.patches else {})


class MetricsFile:
    def __init__(self, path: Path):
        self.path = path

    def cut(self, step: int) -> None:
        """Removes lines behind `step` and a half-written last one."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        replace_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        log.info("%s", " ".join(f"{key} {_short(value)}" for key, value in record.items()))


def replace_text(path: Path, text: str) -> None:
    """Writes a whole file or none, also if the power goes."""
    draft = path.with_name(f".{path.name}.part")
    with draft.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
