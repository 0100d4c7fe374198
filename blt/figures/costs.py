"""The figure of `blt bench latency`: the time of a byte by part, above the time that reading the weights alone takes.

Stacked bars on one scale. `render` makes PNG or HTML with matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blt.figures import page
from blt.figures.page import INK, MUTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "entropy": "#4a76a8",
    "hashing": "#b5a642",
    "encoder": "#7fb3a6",
    "latent": "#d9822b",
    "decoder": "#8a6fa8",
    "sampling": "#c46d7b",
    "other": "#9aa5b1",
}
OTHER = "#9aa5b1"
NARROW = 0.045  # share of the longest bar below which a piece is too narrow for its number


@dataclass(frozen=True)
class Bar:
    """Seconds by part, in the order in which they are stacked."""

    label: str
    seconds: Mapping[str, float]

    def pieces(self) -> Iterator[tuple[str, float, float]]:
        """Part, start and length in seconds of each piece; parts that take no time are left out."""
        begin = 0.0
        for part, seconds in self.seconds.items():
            if seconds > 0:
                yield part, begin, seconds
                begin += seconds

    @property
    def total(self) -> float:
        return sum(seconds for _, _, seconds in self.pieces())


@dataclass(frozen=True)
class Bars:
    """The content of the figure: bars from top to bottom."""

    bars: Sequence[Bar]
    title: str = ""

    @property
    def longest(self) -> float:
        return max(bar.total for bar in self.bars)

    def parts(self) -> list[str]:
        """Every part that is drawn, in order."""
        return list(dict.fromkeys(part for bar in self.bars for part, _, _ in bar.pieces()))


def render(bars: Bars, kind: str) -> bytes:
    """The figure as the bytes of a file; kind is "png" or "html". Raises UsageError for another."""
    return page.render(kind, lambda: _draw(bars), title=bars.title, heading="Where the time of a byte goes")


def duration(seconds: float) -> str:
    """Three digits and the unit: s, ms or µs."""
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{scale * seconds:.3g} {unit}"


def _draw(bars: Bars) -> Figure:
    """7.2 inches wide."""
    from matplotlib.patches import Patch

    canvas = page.canvas(7.2, 0.55 * len(bars.bars) + 1.5)
    ax = canvas.subplots()
    for row, bar in enumerate(bars.bars):
        for part, begin, seconds in bar.pieces():
            colour = COLOURS.get(part, OTHER)
            piece = ax.barh(row, 1e3 * seconds, left=1e3 * begin, height=0.62, color=colour, linewidth=0)
            page.hover(piece[0], f"{part}: {duration(seconds)}, {seconds / bar.total:.1%}")
            if seconds > NARROW * bars.longest:
                x = 1e3 * (begin + seconds / 2)
                ax.text(x, row, f"{1e3 * seconds:.3g}", fontsize=6, color="white", ha="center", va="center")
        ax.text(1e3 * bar.total, row, f" {duration(bar.total)}", fontsize=7, color=INK, va="center")
    ax.set_yticks(range(len(bars.bars)), [bar.label for bar in bars.bars], fontsize=8, color=INK)
    ax.invert_yaxis()
    ax.margins(x=0.12)
    ax.set_xlabel("ms per byte", fontsize=8, color=INK)
    ax.tick_params(axis="x", labelsize=7, colors=MUTED)
    ax.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    handles = [Patch(color=COLOURS.get(part, OTHER), label=part) for part in bars.parts()]
    canvas.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=7, frameon=False)
    return canvas
