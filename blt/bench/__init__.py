"""How fast a model runs on this machine: `blt bench`. numpy and the runtime only."""

from blt.bench.measure import Latency, Weights, at_patch_size, latency
from blt.bench.parts import PARTS, Split, split
from blt.bench.patches import Patching, patching
from blt.bench.runs import Forced, Run, Text, bench_text, run, with_changes
from blt.bench.throughput import SHIFT, BatchRun, PrefillGaps, batch_run, prefill_gaps, shifted_texts

__all__ = [
    "PARTS",
    "SHIFT",
    "BatchRun",
    "Forced",
    "Latency",
    "Patching",
    "PrefillGaps",
    "Run",
    "Split",
    "Text",
    "Weights",
    "at_patch_size",
    "batch_run",
    "bench_text",
    "latency",
    "patching",
    "prefill_gaps",
    "run",
    "shifted_texts",
    "split",
    "with_changes",
]
