"""Asynchronous checkpoints: the state is copied to memory, and a thread of each rank writes it while training goes on.

`blt.train.checkpoints.write` is the same in both cases: a folder becomes visible when all of its files are complete, so
a process that is killed while it writes leaves the checkpoint before. The threads have a process group of their own,
because their collectives run between those of the steps. A write waits for the one before, so that at most one copy of
the state exists.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from blt.train import checkpoints
from blt.train.parallel import Ranks


class BackgroundWriter:
    """Writes checkpoints one after another. Every rank makes one, and every rank calls each method."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks.apart()
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None

    def write(self, folder: Path, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any], **how: Any) -> None:
        """`checkpoints.write` of copies, which returns before anything is written.

        Raises CheckpointError if the checkpoint before could not be written.
        """
        self.wait()
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        state = copy.deepcopy(state)
        self._pending = self._threads.submit(
            checkpoints.write, folder, step, copies, state, **{**how, "ranks": self._ranks}
        )

    def wait(self) -> None:
        """Until the last checkpoint is complete. Raises CheckpointError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """`wait`, and the thread ends."""
        self._threads.shutdown()
        self.wait()
