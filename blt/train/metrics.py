"""metrics.jsonl (one object per line), and the sums over steps that its records report.

Rates are means over the steps since the last line, even if the run was stopped and resumed in between. On resume, lines
after the checkpoint's step are removed, so that the file is that of an uninterrupted run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blt.data.batches import Batch, Groups, Int
from blt.files import naming, replace_text
from blt.train.parallel import Ranks
from blt_runtime import reading
from blt_runtime.ids import OFFSET


class MetricWindow:
    """Sums over the steps since the last log line, and the total seconds of training."""

    def __init__(self) -> None:
        self.total_seconds, self.began = 0.0, time.monotonic()
        self.reset()

    def reset(self) -> None:
        """Begins a new window; the seconds of the old one are added to `total_seconds`."""
        self.total_seconds += time.monotonic() - self.began
        self.nats = self.seconds = self.waited = 0.0
        self.targets = self.bytes = self.tokens = self.places = 0  # the names are keys of a checkpoint's state
        self.patches = self.patch_places = self.skipped = 0
        self.buckets: dict[str, int] = {}
        self.start()

    def start(self) -> None:
        """Starts the clock, on top of restored seconds."""
        self.began = time.monotonic() - self.seconds

    def state(self) -> dict[str, Any]:
        """The sums and seconds so far, as plain values for JSON."""
        sums = {name: value for name, value in vars(self).items() if name != "began"}
        return sums | {"seconds": time.monotonic() - self.began, "buckets": dict(self.buckets)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a `state`; an empty one is that of a new window."""
        self.reset()
        self.total_seconds = 0.0
        vars(self).update(state)
        self.buckets = dict(self.buckets)
        self.start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside."""
        before = time.monotonic()
        yield
        self.began += time.monotonic() - before

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent inside as `waited`: a step that waits for its batch. It stays in the window's time."""
        before = time.monotonic()
        yield
        self.waited += time.monotonic() - before

    @property
    def elapsed(self) -> float:
        """Seconds of this window."""
        return max(time.monotonic() - self.began, 1e-9)

    @property
    def all_seconds(self) -> float:
        """Seconds of training since the run began, those before a resume included."""
        return self.total_seconds + time.monotonic() - self.began

    def add(self, nats: float, batch: Batch) -> None:
        """Adds one step: its summed loss in nats and its GLOBAL batch."""
        self.nats += nats
        self.targets += batch.n_targets
        self.bytes += batch.n_bytes
        self.tokens += batch.n_tokens
        self.places += batch.places
        self.patches += batch.n_patches
        self.patch_places += batch.patch_places
        for length in map(str, batch.micro_lengths):
            self.buckets[length] = self.buckets.get(length, 0) + 1

    def skip(self) -> None:
        """Counts a step that was skipped because its loss or gradient was not finite."""
        self.skipped += 1

    def summary(self) -> dict[str, Any]:
        """The numbers of the window:

        loss (nats per counted target), bpb (bits per byte), bytes_per_s, padding (share of the byte positions), buckets
        (micro-batches of each length); with patches also patch_size (tokens per patch; the one-token first patch of
        each row counts) and patch_padding (share of the patch positions); skipped (steps), if there were any. A window
        that holds only skipped steps has only `skipped`.
        """
        if self.skipped and not self.buckets:
            return {"skipped": self.skipped}
        found: dict[str, Any] = {
            "loss": self.nats / max(1, self.targets),
            "bpb": self.nats / math.log(2) / max(1, self.bytes),
            "bytes_per_s": self.bytes / self.elapsed,
            "padding": 1 - self.tokens / max(1, self.places),
            "buckets": dict(sorted(self.buckets.items(), key=lambda item: int(item[0]))),
        }
        if self.patches:
            found["patch_size"] = self.tokens / self.patches
            found["patch_padding"] = 1 - self.patches / self.patch_places
        return found | ({"skipped": self.skipped} if self.skipped else {})


class GroupSums:
    """The nats and bytes of each group of documents, of this rank's rows.

    token_bytes [V]: as in `TokenSource`.
    """

    def __init__(self, groups: Groups, token_bytes: Int | None, device: torch.device):
        self.names, self.token_bytes = groups.names, token_bytes
        self.nats_G = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self.bytes_G = np.zeros(len(self.names))

    def add(self, part: Batch, groups: Tensor, losses: Tensor) -> None:
        """Adds a micro-batch: the groups and the nats of its targets, both on the device. Nothing waits for it."""
        self.nats_G.index_add_(0, groups.flatten(), losses.flatten().double())
        counts = part.targets >= OFFSET if self.token_bytes is None else self.token_bytes[part.targets]
        assert part.target_groups is not None
        self.bytes_G += np.bincount(
            part.target_groups.ravel(), weights=(counts * part.mask).ravel(), minlength=len(self.names)
        )

    def bits_per_byte(self, ranks: Ranks) -> dict[str, float]:
        """Of all ranks' rows, by the name of the group; groups without bytes are left out. Every rank calls it."""
        sums = np.array(ranks.sum(*self.nats_G.tolist(), *self.bytes_G.tolist())).reshape(2, -1).T.tolist()
        pairs = zip(self.names, sums, strict=True)
        return {name: nats / math.log(2) / n_bytes for name, (nats, n_bytes) in pairs if n_bytes}


class MetricsFile:
    """Appends records to metrics.jsonl. `writes` is True on one rank only; the others write nothing.

    `on_record` is called with every record.
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes
        self.on_record: Callable[[dict[str, Any]], None] = lambda record: None

    def cut(self, step: int) -> None:
        """Removes lines after `step`, and a last line that is incomplete."""
        if not self.writes or not self.path.exists():
            return
        kept = [
            line for line in reading.read_text(self.path, reading.LARGEST_LOG).splitlines() if _step_of(line) <= step
        ]
        replace_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record."""
        if not self.writes:
            return
        with naming(self.path), self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.on_record(record)

    def return_to(self, step: int, event: dict[str, Any]) -> None:
        """Removes lines after `step` and appends an event, unless a run that was killed in this call wrote it."""
        self.cut(step)
        if self.writes and json.dumps(event) not in reading.read_text(self.path, reading.LARGEST_LOG).splitlines():
            self.write(event)


def _step_of(line: str) -> float:
    try:
        return float(reading.parse_json(line, finite=False)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
