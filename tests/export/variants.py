"""Two tiny variants that between them use every option of the architecture."""

from __future__ import annotations

from collections.abc import Callable

from blt_export import ExportReport
from blt_export.state import ExportState

VARIANTS = ("all_layers_gqa_projection", "cross_windows_own_heads_newlines")
FLAVOURS = ("portable", "ort")
Prepare = Callable[[str, str], ExportState]
BundleOf = Callable[[str, str], ExportReport]
