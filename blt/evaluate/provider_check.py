"""The work of `blt check BUNDLE --provider P`: a bundle on a device against a reference on the CPU, over one text.

Both read the text in one chunk and then step by step, and then generate greedily. A device compiles kernels for each
new shape, so few shapes occur. Logits are compared up to the first boundary that moved: after it both read different
patches.

Letters: N ids, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blt_runtime import Model
from blt_runtime.ids import Ids, shared_length

TOLERANCES = {"fp32": 2e-5, "fp16": 5e-3, "bf16": 4e-2, "fp8": 5e-2}
"""Root mean square of the errors over that of the reference, by precision."""
MOST_MOVED = 0.002
"""Share of the patch boundaries of a text that may move without a warning, or a failure."""
CHUNK = 16
"""Ids read at once, before the steps."""
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Comparison:
    """Errors are relative root mean squares; largest: of the entropies, in nats. near: positions whose entropy is
    within twice that of the threshold. lost, new: patches that only the reference, only the candidate ends at a
    position. compared: positions before the first of these, of whose logits `logits` is the error. agreement: equal
    bytes of greedy text, of `greedy`."""

    positions: int
    compared: int
    logits: float
    entropies: float | None
    largest: float | None
    near: int
    lost: int
    new: int
    agreement: int
    greedy: int
    tolerance: float

    @property
    def flips(self) -> int:
        """Patch decisions that differ."""
        return self.lost + self.new

    @property
    def failure(self) -> str | None:
        """Why the check fails; None if it does not."""
        if not self.logits <= self.tolerance:
            return f"logits have a relative error of {self.logits:.1e}, more than {self.tolerance:g}"
        if self.entropies is not None and not self.entropies <= self.tolerance:
            return f"entropies have a relative error of {self.entropies:.1e}, more than {self.tolerance:g}"
        if self.flips > MOST_MOVED * self.positions:
            share = f"{self.flips} of {self.positions:,} patch decisions differ, more than {MOST_MOVED:.1%}"
            return f"{share} ({self.lost} boundaries lost, {self.new} new)"
        return None


def compare(
    reference: Model,
    candidate: Model,
    ids: Ids,
    precision: str,
    greedy: int,
    progress: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """Compares both over ids [N], and over `greedy` more. progress: gets the number of ids that the candidate has just
    read."""
    want, got = _read(reference, ids, greedy), _read(candidate, ids, greedy, progress)
    moved = np.setxor1d(want.ends, got.ends)
    compared = int(np.searchsorted(want.positions, moved[0] - 1)) if len(moved) else len(want.positions)
    errors = np.abs(got.entropies - want.entropies)
    with_entropies = not np.isnan(want.entropies).all()
    largest = float(errors.max()) if with_entropies else None
    threshold = reference.spec.patch_rule.threshold
    near = 0
    if largest is not None and threshold is not None:
        near = int((np.abs(want.entropies - threshold) <= 2 * largest).sum())
    return Comparison(
        positions=len(ids),
        compared=compared,
        logits=_relative(got.logits[:compared], want.logits[:compared]),
        entropies=_relative(got.entropies, want.entropies) if with_entropies else None,
        largest=largest,
        near=near,
        lost=len(np.setdiff1d(want.ends, got.ends)),
        new=len(np.setdiff1d(got.ends, want.ends)),
        agreement=shared_length(want.greedy, got.greedy),
        greedy=len(want.greedy),
        tolerance=TOLERANCES[precision],
    )


@dataclass(frozen=True)
class _Results:
    """logits [n, V] at positions [n]; entropies [N]; positions where a patch ends."""

    positions: Ids
    logits: Array
    entropies: Array
    ends: Ids
    greedy: Ids


def _read(model: Model, ids: Ids, greedy: int, progress: Callable[[int], None] = lambda done: None) -> _Results:
    stream, positions, logits = model.stream(bos=False), [], []
    for start, end in [(0, min(CHUNK, len(ids))), *((t, t + 1) for t in range(CHUNK, len(ids)))]:
        stream.append_ids(ids[start:end])
        positions.append(end - 1)
        logits.append(stream.logits.copy())
        progress(end - start)
    entropies = stream.snapshot().arrays["entropies"][: len(ids)].copy()
    ends = np.cumsum(stream.patch_lengths[:-1])
    made = list(stream.generate_ids(greedy, temperature=0.0, stop_at_eos=False)) if greedy else []
    return _Results(np.array(positions), np.stack(logits), entropies, ends, np.array(made, np.int64))


def _relative(got: Array, want: Array) -> float:
    """0 for nothing. NaN and infinity stay, and exceed every tolerance."""
    if not want.size:
        return 0.0
    scale = float(np.sqrt(np.square(want, dtype=np.float64).mean()))
    return float(np.sqrt(np.square(got.astype(np.float64) - want).mean())) / (scale or 1.0)
