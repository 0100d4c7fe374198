"""Reads texts in the rows of a batch."""

from __future__ import annotations

import numpy as np

from blt_runtime.engine.batch import Batch


def read_texts(batch: Batch, texts: dict[int, np.ndarray], prompts: dict[int, int]) -> dict[int, list[np.ndarray]]:
    """Logits of texts, one text per row: after the prompt, which one call feeds, and after each later byte."""
    opened = {}
    for name, ids in texts.items():
        row = batch.open()
        assert row is not None
        row.feed(ids[: prompts[name]])
        opened[row.index] = name, row, prompts[name]
    seen: dict[int, list[np.ndarray]] = {name: [] for name in texts}
    for _ in range(10_000):
        if not opened:
            return seen
        for row in batch.round():
            assert row.error is None
            name, _, fed = opened[row.index]
            seen[name].append(row.logits_V.copy())
            if fed == len(texts[name]):
                del opened[row.index]
                batch.close(row)
            else:
                row.feed(texts[name][fed : fed + 1])
                opened[row.index] = name, row, fed + 1
    raise AssertionError("rows did not finish")
