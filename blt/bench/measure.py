"""How fast one stream generates, and how near that is to the speed at which memory gives the weights.

Speed is measured on untouched streams, the memory's bandwidth between them; `split` then says where the time goes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from blt.bench.machine import Bandwidth, MemoryReader, peak_memory, resident_bytes
from blt.bench.parts import Split, split
from blt.bench.runs import Forced, Run, Text, run, with_changes
from blt.data.threshold import Piece, find_rule
from blt_runtime import Model
from blt_runtime.errors import UsageError
from blt_runtime.ids import BOS
from blt_runtime.speculation.speculate import Speculate

WARM_UP = 8
"""Bytes generated before the first timed run: lazily made memory and threads are there afterwards."""
Weights = Mapping[str, float]
"""Bytes of weights that one call of each of PARTS reads; empty if unknown."""


@dataclass(frozen=True)
class Latency:
    """What was measured. per_call: bytes of weights that a call of each part reads; tables_bytes: resident hash tables,
    None if unknown or absent."""

    runs: Sequence[Run]
    split: Split
    bandwidth: Bandwidth
    per_call: Weights
    peak_bytes: int
    tables_bytes: int | None
    prompt_bytes: int

    @cached_property
    def bytes_per_s(self) -> float:
        """Median of the runs."""
        return statistics.median(run.bytes_per_s for run in self.runs)

    @property
    def first_byte_s(self) -> float:
        return statistics.median(run.first_byte_s for run in self.runs)

    @property
    def prefill_s(self) -> float:
        return statistics.median(run.prefill_s for run in self.runs)

    @property
    def mean_patch(self) -> float:
        return self.runs[0].mean_patch

    def gap_s(self, percent: float) -> float:
        """That percentile of the gaps of all runs, linearly interpolated."""
        return float(np.percentile(np.concatenate([run.gaps_s for run in self.runs]), percent))

    @cached_property
    def weights(self) -> dict[str, float]:
        """Bytes of weights that were read per byte, by part: calls really made, times what a call reads."""
        return {part: read * self.split.per_byte(part) for part, read in self.per_call.items()}

    @property
    def floor_bytes_per_s(self) -> float | None:
        """Bytes per second if reading the weights were all there is to do; None if they are unknown."""
        total = sum(self.weights.values())
        return self.bandwidth.bytes_per_s / total if total else None

    @property
    def share_of_floor(self) -> float | None:
        floor = self.floor_bytes_per_s
        return self.bytes_per_s / floor if floor else None

    def floor_s(self) -> dict[str, float]:
        """Seconds that reading the weights for one byte takes at the measured bandwidth, by part."""
        return {part: read / self.bandwidth.bytes_per_s for part, read in self.weights.items()}


def latency(
    model: Model,
    text: Text,
    per_call: Weights,
    *,
    repeat: int,
    temperature: float,
    threads: int,
    speculate: Speculate = "off",
) -> Latency:
    """Measures `repeat` runs, each on a new stream, and the memory's bandwidth on `threads` threads between them.

    Raises CapacityError if the text does not fit.
    """
    text.check_room(model.spec.capacity_bytes)
    warm = Text(text.prompt, text.new[:WARM_UP])
    run(model.stream(), warm, Forced(warm.new.tolist(), temperature), speculate)
    runs = [run(model.stream(), text, Forced(text.new.tolist(), temperature), speculate)]
    peak, tables = peak_memory(), _tables_bytes(model)  # before the buffer below is there
    reader = MemoryReader(threads)
    try:
        reader.sample()
        for _ in range(repeat - 1):
            runs.append(run(model.stream(), text, Forced(text.new.tolist(), temperature), speculate))
            reader.sample()
        parts = split(model, text, temperature, speculate)
        bandwidth = reader.sample()
    finally:
        reader.close()
    return Latency(runs, parts, bandwidth, per_call, peak, tables, len(text.prompt))


def at_patch_size(model: Model, texts: Sequence[Text], mean: float, by_rises: bool = False) -> Model:
    """The same model with the threshold that cuts the texts' new bytes into patches of `mean` bytes. by_rises: of how
    much the entropy rises from byte to byte, which cuts different texts more alike where weights are random.

    Raises UsageError if no threshold does, or if the rule has none.
    """
    rule = model.spec.patch_rule
    if not rule.needs_entropy:
        raise UsageError(f"--patch-size chooses a threshold, but this model cuts text by the scheme {rule.scheme!r}")
    if by_rises:
        rule = replace(rule, monotonic=True, threshold_add=None)
    tails = [_tail(model, text) for text in texts]
    return with_changes(model, spec=replace(model.spec, patch_rule=find_rule(rule, tails, mean)))


def _tail(model: Model, text: Text) -> Piece:
    """The new bytes with their entropies; the last id of the prompt stands as BOS."""
    text.check_room(model.spec.capacity_bytes)
    entropies_N = model.score(np.concatenate([[BOS], text.prompt, text.new])).entropies
    return Piece(np.concatenate([[BOS], text.new]), entropies_N[-len(text.new) - 1 :])


def _tables_bytes(model: Model) -> int | None:
    tables = model.manifest.hash_tables if model.manifest else None
    return resident_bytes(tables.file) if tables else None
