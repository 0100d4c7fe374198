"""Loss spikes, and the way back from them: `run.spike_rollback`.

A step is a spike if its loss is above median + 7 * 1.4826 * MAD of the last 100 losses (1.4826 times the median
absolute deviation estimates a standard deviation), or if its loss or gradient norm is not finite. The trainer then
returns to a checkpoint of at least 100 steps before and skips the batches since then and 100 more. Chowdhery et al.
(2022, "PaLM", section 5.1) did so by hand, with 200 to 500 batches. A finite gradient norm is no sign of a spike: in
four healthy runs of docs/training.md#muon, the largest loss is 5.0 such deviations above the median, and the largest
norm 8.7.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from blt_runtime.errors import BltError

WINDOW = 100
"""Losses that a step is compared with; before there are so many, only losses and norms that are not finite count."""
DEVIATIONS, NORMAL = 7.0, 1.4826
BACK, SKIP = 100, 100
"""Steps between a checkpoint and a spike at least; batches that are skipped after that of the spike."""


class LossSpike(BltError):
    """A step that is not taken, because training returns to a checkpoint."""


class Spikes:
    """The losses of the last steps, and how often training went back. most: rollbacks of the run, 0 for none.

    `skipped` counts the batches that rollbacks left out. `returned` is the step that the last one returned to.
    """

    def __init__(self, most: int = 0):
        self.most = most
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.rollbacks = self.skipped = 0
        self.returned: int | None = None

    def limit(self) -> float:
        """The largest loss that is no spike, in nats per target."""
        if len(self.losses) < WINDOW:
            return math.inf
        middle = statistics.median(self.losses)
        deviation = statistics.median(abs(loss - middle) for loss in self.losses)
        return middle + DEVIATIONS * NORMAL * deviation

    def found(self, loss: float, norm: float) -> str:
        """What makes this step a spike; empty if it is none, or if the run does not go back."""
        if not self.most:
            return ""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        limit = self.limit()
        return f"the loss is {loss:.4g}, above {limit:.4g}" if loss > limit else ""

    def add(self, loss: float) -> None:
        """Adds the loss of a step that was taken."""
        self.losses.append(loss)

    def roll_back(self, step: int, skipped: int) -> None:
        """Counts a rollback to `step` that skips so many batches."""
        self.rollbacks, self.skipped, self.returned = self.rollbacks + 1, self.skipped + skipped, step

    def is_target(self, step: int, at: int, every: int) -> bool:
        """Whether a spike after `at` steps may lead back to the checkpoint of `step`. Only regular checkpoints, `every`
        steps apart, are targets, so that a run that was stopped in between returns to the same one. That of the last
        rollback is one at once."""
        return step % every == 0 and (step <= at - BACK or step == self.returned)

    def is_needed(self, step: int, at: int, every: int) -> bool:
        """Whether the checkpoint of `step` may still be the newest target after `at` steps or later."""
        return self.most > 0 and step % every == 0 and step > at - BACK - every

    def state(self) -> dict[str, Any]:
        """Plain values for JSON."""
        kept = ("rollbacks", "skipped", "returned")
        return {"losses": list(self.losses), **{name: getattr(self, name) for name in kept}}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from a `state`; an empty one is that of a new run."""
        self.losses = deque(state.get("losses", ()), maxlen=WINDOW)
        self.rollbacks, self.skipped = state.get("rollbacks", 0), state.get("skipped", 0)
        self.returned = state.get("returned")
