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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blt.data.batches import Batch

log = logging.getLogger("blt.train")


class Window:
    """Sums over the steps since the last log line, and the seconds of training in all."""

    def __init__(self) -> None:
        self.total_seconds, self.began = 0.0, time.monotonic()
        self.reset()

    def reset(self) -> None:
        """A new window. `total_seconds` keeps what the old ones took."""
        self.total_seconds += time.monotonic() - self.began
        self.nats = self.seconds = 0.0
        self.targets = self.bytes = self.tokens = self.places = 0
        self.patches = self.patch_places = self.skipped = 0
        self.buckets: dict[str, int] = {}
        self.start()

    def start(self) -> None:
        """The clock runs from here, on top of the seconds that were restored."""
        self.began = time.monotonic() - self.seconds

    def state(self) -> dict[str, Any]:
        """The sums and the seconds so far; plain values for JSON."""
        sums = {name: value for name, value in vars(self).items() if name != "began"}
        return sums | {"seconds": time.monotonic() - self.began, "buckets": dict(self.buckets)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`; an empty one is that of a new window."""
        self.reset()
        self.total_seconds = 0.0
        vars(self).update(state)
        self.buckets = dict(self.buckets)
        self.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        before = time.monotonic()
        yield
        self.began += time.monotonic() - before

    @property
    def all_seconds(self) -> float:
        """Seconds of training since the run began, also before a stop."""
        return self.total_seconds + time.monotonic() - self.began

    def add(self, nats: float, batch: Batch) -> None:
        """One step: the sum of its loss in nats, and its GLOBAL batch."""
        self.nats += nats
        self.targets += batch.n_targets
        self.bytes += batch.n_bytes
        self.tokens += batch.n_tokens
        self.places += batch.mask.size
        self.patches += batch.n_patches
        self.patch_places += batch.patch_places
        key = str(batch.bucket)
        self.buckets[key] = self.buckets.get(key, 0) + 1

    def skip(self) -> None:
        """One step whose loss or gradient was not finite, and which changed nothing."""
        self.skipped += 1

    def summary(self) -> dict[str, Any]:
        """loss (nats per counted target), bpb (bits per byte), bytes_per_s, padding (share of the byte places), buckets
        (batches of each length); with patches also patch_size (tokens a patch, the one-token first patch of each row
        counted) and patch_padding (share of the patch places); skipped (steps), if there were any. A window of skipped
        steps alone has nothing else."""
        if self.skipped and not self.buckets:
            return {"skipped": self.skipped}
        seconds = max(time.monotonic() - self.began, 1e-9)
        found: dict[str, Any] = {
            "loss": self.nats / max(1, self.targets),
            "bpb": self.nats / math.log(2) / max(1, self.bytes),
            "bytes_per_s": self.bytes / seconds,
            "padding": 1 - self.tokens / max(1, self.places),
            "buckets": dict(sorted(self.buckets.items(), key=lambda item: int(item[0]))),
        }
        if self.patches:
            found["patch_size"] = self.tokens / self.patches
            found["patch_padding"] = 1 - self.patches / self.patch_places
        return found | ({"skipped": self.skipped} if self.skipped else {})


class MetricsFile:
    """`writes`: only one of several ranks does; the others are silent."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes
        self.watch: Callable[[dict[str, Any]], str] = lambda record: ""  # gives words for the log line

    def cut(self, step: int) -> None:
        """Removes lines behind `step` and a half-written last one."""
        if not self.writes or not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        replace_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, record: dict[str, Any]) -> None:
        if not self.writes:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        note = self.watch(record)
        log.info("%s%s", " ".join(f"{key} {_short(value)}" for key, value in record.items()), note)


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
    if isinstance(value, dict):
        return ",".join(f"{key}:{_short(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
