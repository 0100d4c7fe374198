"""The figure of `blt bench latency`: the time of a byte by part, above the time that reading the weights alone takes.

Stacked bars on one scale. `render` makes PNG (matplotlib) or HTML (one file with the drawing in it).
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from blt.figures import page
from blt.figures.page import EDGE, INK, MUTED

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
WIDTH, HEIGHT, LEFT, TOP, GAP = 720, 34, 150, 8, 22  # of a bar in the HTML page, in its own units
NARROW = 0.045  # share of the longest bar below which a piece carries no number


@dataclass(frozen=True)
class Bar:
    """Seconds by part, in the order in which they are stacked."""

    label: str
    seconds: Mapping[str, float]

    def pieces(self) -> Iterator[tuple[str, float, float]]:
        """Part, where it begins, how long it is; parts that take no time are left out."""
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
    """What is drawn: bars from top to bottom."""

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
    return page.drawn(kind, lambda: to_png(bars), lambda: to_html(bars))


def duration(seconds: float) -> str:
    """Three digits and the unit: s, ms or µs."""
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    return f"{scale * seconds:.3g} {unit}"


def to_png(bars: Bars) -> bytes:
    """7.2 inches wide at 160 dots per inch. Needs matplotlib."""
    from matplotlib.patches import Patch

    canvas = page.canvas(7.2, 0.55 * len(bars.bars) + 1.5)
    ax = canvas.subplots()
    for row, bar in enumerate(bars.bars):
        for part, begin, seconds in bar.pieces():
            ax.barh(row, 1e3 * seconds, left=1e3 * begin, height=0.62, color=COLOURS.get(part, OTHER), linewidth=0)
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
    return page.png(canvas, bars.title)


_CSS = f"""
svg {{ width: 100%; }}
b {{ display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }}
text {{ font-size: 11px; fill: {INK}; }}
.in {{ fill: #fff; }}
""".strip()


def to_html(bars: Bars) -> str:
    """A page that stands alone: no script, no font, no image from outside. Hover over a piece shows its numbers."""
    legend = "".join(f'<b style="background:{COLOURS.get(p, OTHER)}"></b>{html.escape(p)}' for p in bars.parts())
    height = TOP + len(bars.bars) * (HEIGHT + GAP)
    drawn = "".join(_row(bar, bars.longest, TOP + at * (HEIGHT + GAP)) for at, bar in enumerate(bars.bars))
    body = f'<p>{legend}</p>\n<svg viewBox="0 0 {WIDTH} {height}">\n{drawn}</svg>'
    return page.document(bars.title or "Where the time of a byte goes", body, _CSS)


def _row(bar: Bar, longest: float, top: int) -> str:
    scale, middle = (WIDTH - LEFT - 80) / longest, top + HEIGHT / 2 + 4
    parts = [f'<text x="{LEFT - 8}" y="{middle:.1f}" text-anchor="end">{html.escape(bar.label)}</text>']
    for part, begin, seconds in bar.pieces():
        x, width, shown = LEFT + scale * begin, scale * seconds, duration(seconds)
        says = html.escape(f"{part}: {shown}, {seconds / bar.total:.1%}")
        parts.append(
            f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{HEIGHT}" fill="{COLOURS.get(part, OTHER)}">'
            f"<title>{says}</title></rect>"
        )
        if seconds > 2 * NARROW * longest:
            parts.append(
                f'<text class="in" x="{x + width / 2:.1f}" y="{middle:.1f}" text-anchor="middle">{shown}</text>'
            )
    parts.append(f'<text x="{LEFT + scale * bar.total + 6:.1f}" y="{middle:.1f}">{duration(bar.total)}</text>')
    return "\n".join(parts) + "\n" + f'<line x1="{LEFT}" x2="{LEFT}" y1="{top}" y2="{top + HEIGHT}" stroke="{EDGE}"/>\n'
