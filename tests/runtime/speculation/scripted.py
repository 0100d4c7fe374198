"""A sampler that writes given ids, and a drafter that drafts them with a given probability."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from blt_runtime.sampling import Sampler
from blt_runtime.speculation.drafters import (
    Draft,
    Drafter,
    Source,
)


class Script(Sampler):
    """Writes given ids, whatever the logits are."""

    def __init__(self, ids: np.ndarray) -> None:
        super().__init__(0.0)
        self._ids = iter(ids.tolist())

    def __call__(self, logits_V: np.ndarray) -> int:
        return next(self._ids)


class Oracle(Drafter):
    """Drafts the ids that will be written from position `start` on, each correct with probability `right`.

    With source None it proposes them at once. With a source it extends the draft one id at a time from that model's
    logits, sometimes after some proposals. sure: it leaves no id out."""

    sure = False

    def __init__(
        self, ids: np.ndarray, start: int, right: float, source: Source | None = "entropy", seed: int = 0
    ) -> None:
        self._ids, self.start, self._right, self.source = ids, start, right, source
        self._random = np.random.default_rng(seed)

    def _draft(self, position: int) -> int | None:
        index = position - self.start
        if not 0 <= index < len(self._ids):
            return None
        return int(self._ids[index]) if self._random.random() < self._right else int(self._random.integers(0, 260))

    def propose(self, ids_N: np.ndarray, limit: int) -> Sequence[int]:
        if self.source is None:
            most = limit
        elif self.sure or self._random.random() < 0.5:  # proposals keep the decoder from drafting
            most = 0
        else:
            most = int(self._random.integers(0, limit + 1))
        drafts = [self._draft(len(ids_N) + i) for i in range(most)]
        return [id for id in drafts if id is not None]

    def extend(self, ids_N: np.ndarray, logits_V: np.ndarray) -> Draft | None:
        assert logits_V.shape == (260,)
        id = self._draft(len(ids_N))
        return None if id is None or self._random.random() < 0.05 * (not self.sure) else (id, None)
