"""The figure of `blt calibrate`: threshold, bits per byte and bytes per second against the mean patch size.

The panels are stacked and share the x axis. A quantity that was not measured has no panel. `render` makes PNG or HTML
with matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blt.figures import page
from blt.figures.page import INK, MUTED
from blt.figures.patches import BAR_START

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE = "#4a76a8"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One rule. mean: bytes per patch; the others are None if not measured; mark: a label, empty for most."""

    mean: float
    threshold: float | None
    bits_per_byte: float | None
    bytes_per_s: float | None
    mark: str = ""


@dataclass(frozen=True)
class Tradeoff:
    """The content of the figure: points in the order of their means."""

    points: Sequence[Point]
    title: str = ""

    @property
    def legend(self) -> str:
        """The marked points with their means."""
        return ", ".join(f"{point.mark}: {point.mean:.2f}" for point in self.points if point.mark)

    def panels(self) -> dict[str, list[tuple[float, float, str]]]:
        """Label of the y axis -> (mean, value, mark) of the points that have the value."""
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
    title = "\n".join(text for text in (tradeoff.title, tradeoff.legend) if text)
    return page.render(kind, lambda: _draw(tradeoff), title=title, heading="Patch sizes")


def _draw(tradeoff: Tradeoff) -> Figure:
    """Panels of 6.4 x 2 inches."""
    panels = tradeoff.panels()
    canvas = page.canvas(6.4, 2.0 * len(panels) + 0.6)
    axes = canvas.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for ax, (name, points) in zip(axes, panels.items(), strict=True):
        _draw_panel(ax, name, points)
    axes[-1].set_xlabel("mean patch (bytes)", fontsize=8, color=INK)
    return canvas


def _draw_panel(ax: Axes, name: str, points: Sequence[tuple[float, float, str]]) -> None:
    plain = [(x, y) for x, y, _ in points]
    (line,) = ax.plot(*zip(*plain, strict=True), color=LINE, linewidth=1.2, zorder=2)
    page.hover(line, name)
    for x, y, mark in points:
        colour, size = (BAR_START, 6) if mark else (LINE, 4)
        (dot,) = ax.plot([x], [y], color=colour, marker="o", markersize=size, zorder=3)
        page.hover(dot, f"{x:.3f} bytes per patch, {name} {_number(y)} {mark}".strip())
        ax.annotate(_number(y), (x, y), xytext=(0, 6), textcoords="offset points", fontsize=6, color=MUTED, ha="center")
    ax.margins(x=0.06, y=0.25)
    ax.set_ylabel(name, fontsize=8, color=INK)
    page.quiet(ax)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.4g}"
