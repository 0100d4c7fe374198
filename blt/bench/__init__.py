"""How fast a model runs on this machine: `blt bench`. numpy and the runtime only."""

from blt.bench.measure import Latency, Weights, at_patch_size, latency
from blt.bench.parts import PARTS, Split, split
from blt.bench.patches import Patching, patching
from blt.bench.runs import Forced, Run, Text, bench_text, run, with_changes
from blt.bench.throughput import SHIFT, Joined, Together, joined, texts, together

__all__ = [
    "PARTS",
    "SHIFT",
    "Forced",
    "Joined",
    "Latency",
    "Patching",
    "Run",
    "Split",
    "Text",
    "Together",
    "Weights",
    "at_patch_size",
    "bench_text",
    "joined",
    "latency",
    "patching",
    "run",
    "split",
    "texts",
    "together",
    "with_changes",
]
