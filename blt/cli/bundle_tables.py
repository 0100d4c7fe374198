"""What a bundle's manifest says, as tables and phrases for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from blt_runtime.bundle.engines import EnginesFile, Profile
    from blt_runtime.bundle.manifest import Judged, Manifest, Parity

MEASURES = {
    "largest": "largest, relative",
    "rms": "root mean square, relative",
    "block": "worst block, root mean square, relative",
    "step": "largest, in half steps",
    None: "",
}
"""What `Parity.error` is, by `Parity.measure`."""


def parity_table(rows: Sequence[Parity], reference: str = "PyTorch") -> Table:
    """The comparison with a reference, one row per output."""
    table = Table(title=f"parity with {reference}", title_justify="left", box=None, pad_edge=False)
    for name in ("output", "positions", "error", "tolerance", "", "error is"):
        table.add_column(name, justify="left" if name in ("output", "", "error is") else "right")
    for row in rows:
        verdict = "ok" if row.error <= row.tolerance else "FAILED"
        numbers = f"{row.positions:,}", f"{row.error:.2e}", f"{row.tolerance:.0e}"
        table.add_row(row.output, *numbers, verdict, MEASURES[row.measure])
    return table


def size_table(manifest: Manifest) -> Table:
    """Megabytes by graph, both its forms and their weights, and of the hash tables."""
    from blt.data.quantities import amount

    sizes: dict[str, int] = {}
    tables = {ref.file for ref in manifest.tables.values()}
    for name, entry in manifest.files.items():
        part = "hash tables" if name in tables else name.split(".")[0]
        sizes[part] = sizes.get(part, 0) + entry.bytes
    table = Table(title="sizes", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column("part")
    table.add_column("size", justify="right")
    for part, size in sizes.items():
        table.add_row(part, amount(size))
    table.add_row("total", amount(sum(sizes.values())))
    return table


def engines_table(file: EnginesFile, manifest: Manifest) -> Table:
    """One row per engine: its size and, for each profile, the bytes, patches and entries that one call takes."""
    from blt.data.quantities import amount

    table = Table(title="engines", title_justify="left", box=None, pad_edge=False)
    for name in ("graph", "size", "profiles"):
        table.add_column(name, justify="right" if name == "size" else "left")
    streams = [""] if file.rows is None else ["", f" of {file.rows.streams} streams"]
    for suffix, plans in zip(streams, file.forms, strict=True):
        for name, plan in plans.items():
            table.add_row(name + suffix, amount(plan.bytes), ", ".join(map(_range_text, plan.profiles)))
    total = sum(plan.bytes for plans in file.forms for plan in plans.values())
    if file.weights:
        weights = sum(manifest.files[name].bytes for name in file.weights)
        table.add_row("weights", amount(weights), "put into the engines when they are opened")
        total += weights
    table.add_row("total", amount(total), "")
    return table


def _range_text(profile: Profile) -> str:
    """`1`, `1-16` bytes; of the latent graph patches x entries: `1 x 8`, `1-128 x 1-16`. Of each batched stream."""
    shapes = profile["byte_index"] if "byte_index" in profile else profile["positions"]
    least, most = shapes[0][1:], shapes[-1][1:]
    return " x ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(least, most, strict=True))


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
