"""How fast a model runs on this machine: `blt bench`. numpy and the runtime only."""

from blt.bench.measure import Latency, Weights, at_patch_size, latency
from blt.bench.parts import PARTS, Split, split
from blt.bench.patches import Patching, patching
from blt.bench.runs import Forced, Run, Text, bench_text, run

__all__ = [
    "PARTS",
    "Forced",
    "Latency",
    "Patching",
    "Run",
    "Split",
    "Text",
    "Weights",
    "at_patch_size",
    "bench_text",
    "latency",
    "patching",
    "run",
    "split",
]
