"""The figure of `blt calibrate`: threshold, bits per byte and bytes per second against the mean patch.

Panels below each other share the x axis; what was not measured has no panel. `render` makes PNG (matplotlib) or HTML
(one file with the drawing in it, no external assets).
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blt.figures import page
from blt.figures.page import EDGE, INK, MUTED
from blt.figures.patches import BAR_START

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE = "#4a76a8"
WIDTH, HEIGHT, LEFT, TOP, GAP = 720, 170, 76, 12, 34  # of a panel in the HTML page, in its own units


@dataclass(frozen=True)
class Point:
    """One rule. mean: bytes per patch; the rest None where it does not exist; mark: a label, empty for most."""

    mean: float
    threshold: float | None
    bits_per_byte: float | None
    bytes_per_s: float | None
    mark: str = ""


@dataclass(frozen=True)
class Tradeoff:
    """What is drawn: points in the order of their means."""

    points: Sequence[Point]
    title: str = ""

    @property
    def legend(self) -> str:
        """Names the marked points."""
        return ", ".join(f"{point.mark}: {point.mean:.2f}" for point in self.points if point.mark)

    def panels(self) -> dict[str, list[tuple[float, float, str]]]:
        """Label of the y axis: (mean, value, mark) of the points that have the value."""
        values = {
            "threshold (nats)": [point.threshold for point in self.points],
            "bits per byte": [point.bits_per_byte for point in self.points],
            "bytes/s, expected": [point.bytes_per_s for point in self.points],
        }
        drawn = {
            name: [(p.mean, y, p.mark) for p, y in zip(self.points, column, strict=True) if y is not None]
            for name, column in values.items()
        }
        return {name: panel for name, panel in drawn.items() if panel}


def render(tradeoff: Tradeoff, kind: str) -> bytes:
    """The figure as the bytes of a file; kind is "png" or "html". Raises UsageError for another."""
    return page.drawn(kind, lambda: to_png(tradeoff), lambda: to_html(tradeoff))


def to_png(tradeoff: Tradeoff) -> bytes:
    """Panels of 6.4 x 2 inches at 160 dots per inch. Needs matplotlib."""
    panels = tradeoff.panels()
    canvas = page.canvas(6.4, 2.0 * len(panels) + 0.6)
    axes = canvas.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for ax, (name, points) in zip(axes, panels.items(), strict=True):
        _draw(ax, name, points)
    axes[-1].set_xlabel("mean patch (bytes)", fontsize=8, color=INK)
    return page.png(canvas, f"{tradeoff.title}\n{tradeoff.legend}")


def _draw(ax: Axes, name: str, points: Sequence[tuple[float, float, str]]) -> None:
    plain = [(x, y) for x, y, _ in points]
    ax.plot(*zip(*plain, strict=True), color=LINE, linewidth=1.2, marker="o", markersize=4, zorder=2)
    for x, y, mark in points:
        if mark:
            ax.plot([x], [y], color=BAR_START, marker="o", markersize=6, zorder=3)
        ax.annotate(_number(y), (x, y), xytext=(0, 6), textcoords="offset points", fontsize=6, color=MUTED, ha="center")
    ax.margins(x=0.06, y=0.25)
    ax.set_ylabel(name, fontsize=8, color=INK)
    page.quiet(ax)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"


_CSS = f"""
svg {{ width: 100%; }}
b {{ color: {BAR_START}; }}
text {{ font-size: 11px; fill: {MUTED}; }}
.name {{ fill: {INK}; }}
""".strip()


def to_html(tradeoff: Tradeoff) -> str:
    """A page that stands alone: no script, no font, no image from outside. Hover over a point shows its numbers."""
    panels = tradeoff.panels()
    low, high = _range([point.mean for point in tradeoff.points])
    drawn = [_panel(name, points, (low, high), at * (HEIGHT + GAP)) for at, (name, points) in enumerate(panels.items())]
    height = len(panels) * (HEIGHT + GAP) + GAP
    axis = f'<text class="name" x="{WIDTH / 2:.0f}" y="{height - 8}" text-anchor="middle">mean patch (bytes)</text>'
    body = (
        f"<p><b>●</b> {html.escape(tradeoff.legend)}</p>\n"
        f'<svg viewBox="0 0 {WIDTH} {height}">\n{"".join(drawn)}{axis}\n</svg>'
    )
    return page.document(tradeoff.title or "Patch sizes", body, _CSS)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis, a tenth of the span beyond the values."""
    low, high = min(values), max(values)
    room = 0.1 * (high - low) or 0.5
    return low - room, high + room


def _panel(name: str, points: Sequence[tuple[float, float, str]], across: tuple[float, float], top: int) -> str:
    low, high = _range([y for _, y, _ in points])
    bottom = top + TOP + HEIGHT

    def place(x: float, y: float) -> tuple[float, float]:
        right = LEFT + (WIDTH - LEFT - 12) * (x - across[0]) / (across[1] - across[0])
        return right, bottom - HEIGHT * (y - low) / (high - low)

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(x, y) for x, y, _ in points))
    parts = [
        f'<line x1="{LEFT}" y1="{bottom}" x2="{WIDTH}" y2="{bottom}" stroke="{EDGE}"/>',
        f'<text class="name" x="{LEFT}" y="{top + TOP}">{html.escape(name)}</text>',
        f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.5"/>',
    ]
    for mean, value, mark in points:
        x, y = place(mean, value)
        colour, radius = (BAR_START, 5) if mark else (LINE, 3.5)
        shown = _number(value)
        says = html.escape(f"{mean:.3f} bytes per patch, {name} {shown} {mark}".strip())
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"><title>{says}</title></circle>')
        parts.append(f'<text x="{x:.1f}" y="{y - 9:.1f}" text-anchor="middle">{shown}</text>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{mean:.2f}</text>')
    return "\n".join(parts) + "\n"
