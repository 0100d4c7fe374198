"""What a bundle's manifest says, as tables and phrases for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from blt_runtime.bundle.manifest import Judged, Manifest, Parity


def parity_table(rows: Sequence[Parity]) -> Table:
    """The export's comparison with PyTorch, one row per output."""
    table = Table(title="parity with PyTorch", title_justify="left", box=None, pad_edge=False)
    for name in ("output", "positions", "error", "tolerance", ""):
        table.add_column(name, justify="left" if name in ("output", "") else "right")
    for row in rows:
        verdict = "ok" if row.max_abs_error <= row.tolerance else "FAILED"
        table.add_row(row.output, f"{row.positions:,}", f"{row.max_abs_error:.2e}", f"{row.tolerance:.0e}", verdict)
    return table


def size_table(manifest: Manifest) -> Table:
    """Megabytes by graph, both its forms and their weights, and of the hash tables."""
    from blt.data.quantities import amount

    sizes: dict[str, int] = {}
    for name, entry in manifest.files.items():
        part = "hash tables" if manifest.hash_tables and name == manifest.hash_tables.file else name.split(".")[0]
        sizes[part] = sizes.get(part, 0) + entry.bytes
    table = Table(title="sizes", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column("part")
    table.add_column("size", justify="right")
    for part, size in sizes.items():
        table.add_row(part, amount(size))
    table.add_row("total", amount(sum(sizes.values())))
    return table


def precision_text(manifest: Manifest) -> str:
    """One precision, or that of each graph where they differ."""
    each = {name: manifest.precision_of(name) for name in manifest.graphs}
    if len(set(each.values())) == 1:
        return next(iter(each.values()))
    return ", ".join(f"{name} {precision}" for name, precision in each.items())


def evaluation_table(evaluated: Judged) -> Table:
    """The export's evaluation on a text: the float32 checkpoint and this bundle."""
    table = Table(title=f"on {evaluated.bytes:,} bytes of text", title_justify="left", box=None, pad_edge=False)
    for name in ("", "float32", "bundle", "difference"):
        table.add_column(name, justify="left" if name == "" else "right")
    before, after = evaluated.float_bits_per_byte, evaluated.bits_per_byte
    table.add_row("bits per byte", f"{before:.4f}", f"{after:.4f}", f"{after / before - 1:+.2%}")
    found = evaluated.boundaries - evaluated.boundaries_lost + evaluated.boundaries_new
    moved = f"{evaluated.boundaries_lost:,} lost, {evaluated.boundaries_new:,} new"
    table.add_row("patch boundaries", f"{evaluated.boundaries:,}", f"{found:,}", moved)
    return table
