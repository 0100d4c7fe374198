"""The figure of `blt plot`: loss and bits per byte of several runs against their cost, on logarithmic axes.

One row of panels shows the training loss (nats per target), the other bits per byte. Thin lines are training, thick
lines with dots validation. There is one column per axis of cost. `render` makes PNG or HTML with matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from blt.figures import page
from blt.figures.metrics import Run
from blt.figures.page import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

COLOURS = ("#3b6ea5", "#d9822b", "#4f9d69", "#b3478c", "#8a6fa8", "#8c6d31", "#2a9fb0", "#b3261e", "#5b6670", "#a3a500")
DASHES: tuple[tuple[float, ...], ...] = ((), (6, 3), (2, 3))  # one per round through the colours
AXES = {"bytes": "bytes trained on", "flops": "training FLOPs", "seconds": "seconds of training", "step": "steps"}
ROWS = (("loss in training (nats per target)", ("loss",)), ("bits per byte (dots: validation)", ("bpb", "valid_bpb")))
MANTISSAS = (
    (1,),
    (1, 2, 5),
    (1, 1.5, 2, 3, 5, 7),
    (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
)
FEWEST, MOST = 4, 9  # ticks of an axis
LETTER, LINE, WIDE, HIGH = 0.06, 0.15, 3.5, 2.2  # inches: a letter and a line of a tick label, the axes of a panel
MOST_DOTS = 500  # of a line; more are not visible

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A run's points (x, y) in one panel; bold: validation."""

    run: int
    label: str
    points: Sequence[Point]
    bold: bool

    @property
    def colour(self) -> str:
        return COLOURS[self.run % len(COLOURS)]

    @property
    def style(self) -> Literal["-"] | tuple[float, Sequence[float]]:
        """Matplotlib's line style: solid, or dashes."""
        dashes = DASHES[self.run // len(COLOURS) % len(DASHES)]
        return (0.0, dashes) if dashes else "-"

    def dots(self) -> Sequence[Point]:
        """At most MOST_DOTS points, evenly spaced; the last one is always among them."""
        every = max(1, -(-len(self.points) // MOST_DOTS))
        return self.points[::-1][::every][::-1]


@dataclass(frozen=True)
class Panel:
    """Lines over one axis of cost, and the ends of the axes."""

    x_key: str
    y_name: str
    lines: Sequence[Line]

    @property
    def x_range(self) -> Point:
        return log_range([x for line in self.lines for x, _ in line.points])

    @property
    def y_range(self) -> Point:
        return log_range([y for line in self.lines for _, y in line.points])


@dataclass(frozen=True)
class Figure:
    """The content of the figure: runs against `axes` (keys of AXES), without records before `least_bytes`."""

    runs: Sequence[Run]
    axes: Sequence[str] = ("bytes", "flops")
    _: KW_ONLY
    title: str = ""
    least_bytes: float = 0

    def panels(self) -> list[list[Panel]]:
        """One row of panels per quantity; with a single axis, one row in all. An axis that no run has is left out."""
        rows = [[self._panel(x, name, keys) for x in self.axes] for name, keys in ROWS]
        kept = [i for i in range(len(self.axes)) if any(row[i].lines for row in rows)]
        drawn = [[row[i] for i in kept] for row in rows if any(row[i].lines for i in kept)]
        return [[panel for row in drawn for panel in row]] if len(kept) == 1 else drawn

    def _panel(self, x: str, name: str, keys: Sequence[str]) -> Panel:
        found = (
            Line(i, run.label, run.points(key, x, self.least_bytes), bold=key.startswith("valid"))
            for key in keys
            for i, run in enumerate(self.runs)
        )
        return Panel(x, name, [line for line in found if line.points])


def log_range(values: Sequence[float]) -> Point:
    """Ends of a logarithmic axis: the values (all above 0) with a small margin; 1 to 10 if there are none."""
    if not values:
        return 1.0, 10.0
    low, high = math.log(min(values)), math.log(max(values))
    room = 0.04 * (high - low) or 0.1
    return math.exp(low - room), math.exp(high + room)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between the ends: powers of ten (every second or third if they are many), else finer ones."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for mantissas in MANTISSAS:
        found = [m * 10.0**e for e in range(first, last + 1) for m in mantissas if low <= m * 10.0**e <= high]
        if len(found) >= FEWEST:
            return found[:: -(-len(found) // MOST)]
    step = 10.0 ** math.floor(math.log10((high - low) / FEWEST))
    found = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return found[:: -(-len(found) // MOST)]


def spaced(at: list[float], ends: Point, sizes: Sequence[float]) -> list[float]:
    """Every tick, or every second, third, ... of them: the first choice in which no two labels touch.

    at: positions between `ends`, on a logarithmic axis. sizes: of the labels, as shares of the axis' length.
    """
    low, length = math.log(ends[0]), math.log(ends[1] / ends[0])
    places = [(math.log(value) - low) / length for value in at]
    for stride in range(1, len(at)):
        kept = range(0, len(at), stride)
        if all(places[b] - places[a] > (sizes[a] + sizes[b]) / 2 for a, b in pairwise(kept)):
            return at[::stride]
    return at[:1]


def tick_label(key: str, value: float) -> str:
    """A tick in the unit of its axis: `2 MB`, `1e+13`, `2.5`."""
    if key == "bytes":
        for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
            if value >= scale:
                return f"{value / scale:.5g} {unit}"
    return f"{value:.5g}" if value < 1e5 else f"{value:.4g}"


def render(figure: Figure, kind: str) -> bytes:
    """The figure as the bytes of a file; kind is "png" or "html". Raises UsageError for another."""
    return page.render(kind, lambda: _draw(figure), title=figure.title, heading="Runs")


def _draw(figure: Figure) -> Canvas:
    """Panels of about 4.4 x 3 inches."""
    from matplotlib.lines import Line2D

    rows = figure.panels()
    across = max((len(row) for row in rows), default=1)
    columns = legend_columns([run.label for run in figure.runs], 4.4 * across)
    legend_rows = -(-len(figure.runs) // columns)
    canvas = page.canvas(4.4 * across, 3.0 * max(1, len(rows)) + 0.5 + 0.18 * legend_rows)
    axes = canvas.subplots(max(1, len(rows)), across, squeeze=False)
    for at, row in enumerate(rows):
        for ax, panel in zip(axes[at], row, strict=True):
            _draw_panel(ax, panel)
    lines = [Line(i, run.label, [], bold=True) for i, run in enumerate(figure.runs)]
    handles = [Line2D([], [], color=line.colour, linestyle=line.style, label=_legend(line)) for line in lines]
    canvas.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)
    return canvas


def _legend(line: Line) -> str:
    """Matplotlib's legend leaves out labels that begin with an underscore, so a space precedes it."""
    label = page.printable(line.label)
    return f" {label}" if label.startswith("_") else label


def legend_columns(labels: Sequence[str], inches: float) -> int:
    """At most three, as many as fit into the width: a letter of 7 points takes about 0.05 inches, the line 0.45."""
    longest = max(map(len, labels), default=1)
    return max(1, min(3, len(labels), int(inches / (0.45 + 0.05 * longest))))


def _draw_panel(ax: Axes, panel: Panel) -> None:
    from matplotlib.ticker import NullFormatter

    ax.set_xscale("log")
    ax.set_yscale("log")
    for line in panel.lines:
        width, alpha = (1.4, 1.0) if line.bold else (0.8, 0.6)
        (drawn,) = ax.plot(
            *zip(*line.points, strict=True), color=line.colour, linestyle=line.style, linewidth=width, alpha=alpha
        )
        page.hover(drawn, line.label)
        for x, y in line.dots() if line.bold else []:
            (dot,) = ax.plot([x], [y], color=line.colour, marker="o", markersize=3)
            page.hover(dot, f"{line.label}: {y:.4f} at {x:.4g}")
    for axis, key, (low, high) in ((ax.xaxis, panel.x_key, panel.x_range), (ax.yaxis, "", panel.y_range)):
        at = ticks(low, high)
        along = [LETTER * (2 + len(tick_label(key, value))) for value in at] if axis is ax.xaxis else [LINE] * len(at)
        at = spaced(at, (low, high), [size / (WIDE if axis is ax.xaxis else HIGH) for size in along])
        axis.set_ticks(at, [tick_label(key, value) for value in at])
        axis.set_minor_formatter(NullFormatter())
    ax.set_xlim(panel.x_range)
    ax.set_ylim(panel.y_range)
    ax.set_xlabel(AXES[panel.x_key], fontsize=8, color=INK)
    ax.set_ylabel(panel.y_name, fontsize=8, color=INK)
    page.quiet(ax)
