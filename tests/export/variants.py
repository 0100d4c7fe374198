"""Two tiny variants that between them use every option of the architecture, and the size of their caches."""

from __future__ import annotations

from collections.abc import Callable

from blt_export import pipeline

VARIANTS = ("all_layers_gqa_projection", "cross_windows_own_heads_newlines")
FLAVOURS = ("portable", "ort")
CAPACITY, CHUNK = 600, 32
Prepare = Callable[[str, str], pipeline.ExportState]
