"""How fast text is cut into patches: the entropies, then the patch rule. No other graph runs."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from blt_runtime import Model
from blt_runtime.engine.memory import Memory
from blt_runtime.engine.prefill import Prefill
from blt_runtime.errors import UsageError
from blt_runtime.ids import encode
from blt_runtime.patching import patch_lengths


@dataclass(frozen=True, kw_only=True)
class Patching:
    """Median seconds for the entropies of `n` bytes and for the patch rule, and the mean patch size that it gave."""

    n: int
    entropies_s: float
    rule_s: float
    mean_patch: float

    @property
    def bytes_per_s(self) -> float:
        return self.n / (self.entropies_s + self.rule_s)


def patching(model: Model, data: bytes, repeat: int) -> Patching:
    """Measures patching alone, in the chunks of a prefill. Raises CapacityError if the text does not fit, and
    UsageError for empty text."""
    if not data:
        raise UsageError("patching needs at least 1 byte of text")
    ids_N, rule = encode(data, bos=True), model.spec.patch_rule
    memory = Memory(model.spec, model.backend, model.hash_tables)
    memory.check_room(len(ids_N))
    prefill = Prefill(memory)
    took = []
    for _ in range(1 + repeat):  # the first one warms up
        memory.clear()
        began = time.perf_counter()
        memory.place(ids_N)
        if rule.needs_entropy:
            prefill.run_entropy(0, len(ids_N))
        read = time.perf_counter() if rule.needs_entropy else began
        lengths_P = patch_lengths(rule, ids_N, memory.entropies.array[0, : len(ids_N)], include_next_token=False)
        took.append((read - began, time.perf_counter() - read))
    entropies_s, rule_s = (statistics.median(column) for column in zip(*took[1:], strict=True))
    mean = len(data) / max(1, len(lengths_P) - 1)
    return Patching(n=len(data), entropies_s=entropies_s, rule_s=rule_s, mean_patch=mean)
