"""The figure of `blt plot`: loss and bits per byte of several runs against what they have cost, on logarithmic axes.

One row of panels is the loss in training (nats per target), the other bits per byte: thin lines are training, thick
ones with dots validation. One column per axis of cost. `render` makes PNG (matplotlib) or HTML (no external assets).
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from blt.figures import page
from blt.figures.metrics import Run
from blt.figures.page import EDGE, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#3b6ea5", "#d9822b", "#4f9d69", "#b3478c", "#8a6fa8", "#8c6d31", "#2a9fb0", "#b3261e", "#5b6670", "#a3a500")
DASHES = ("", "6 3", "2 3")  # further turns through the colours
AXES = {"bytes": "bytes trained on", "flops": "training FLOPs", "seconds": "seconds of training", "step": "steps"}
ROWS = (("loss in training (nats per target)", ("loss",)), ("bits per byte (dots: validation)", ("bpb", "valid_bpb")))
WIDTH, HEIGHT, LEFT, BOTTOM, GAP = 460, 300, 52, 36, 26  # of a panel in the HTML page, in its own units
MANTISSAS = (
    (1,),
    (1, 2, 5),
    (1, 1.5, 2, 3, 5, 7),
    (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
)
FEWEST, MOST = 4, 9  # ticks of an axis
PATH_POINTS = 500  # of a line in the HTML page; more are not visible

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
    def dash(self) -> str:
        """SVG's list of lengths; empty for a solid line."""
        return DASHES[self.run // len(COLOURS) % len(DASHES)]


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
    """What is drawn: runs against `axes` (keys of AXES), leaving out what came before `least_bytes`."""

    runs: Sequence[Run]
    axes: Sequence[str] = ("bytes", "flops")
    title: str = ""
    least_bytes: float = 0

    def panels(self) -> list[list[Panel]]:
        """Rows of panels, one a quantity, side by side where there is one axis; an axis that no run has is left out."""
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
    """Ends of a logarithmic axis: a little room beyond the values (all above 0); 1 to 10 without any."""
    if not values:
        return 1.0, 10.0
    low, high = math.log(min(values)), math.log(max(values))
    room = 0.04 * (high - low) or 0.1
    return math.exp(low - room), math.exp(high + room)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between the ends: powers of ten (every second or third where there are many), else finer ones."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for mantissas in MANTISSAS:
        found = [m * 10.0**e for e in range(first, last + 1) for m in mantissas if low <= m * 10.0**e <= high]
        if len(found) >= FEWEST:
            return found[:: -(-len(found) // MOST)]
    step = 10.0 ** math.floor(math.log10((high - low) / FEWEST))
    found = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return found[:: -(-len(found) // MOST)]


def tick_label(key: str, value: float) -> str:
    """A tick in the unit of its axis: `2 MB`, `1e+13`, `2.5`."""
    if key == "bytes":
        for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
            if value >= scale:
                return f"{value / scale:.5g} {unit}"
    return f"{value:.5g}" if value < 1e5 else f"{value:.4g}"


def render(figure: Figure, kind: str) -> bytes:
    """The figure as the bytes of a file; kind is "png" or "html". Raises UsageError for another."""
    return page.drawn(kind, lambda: to_png(figure), lambda: to_html(figure))


# --- PNG ---------------------------------------------------------------------------------------------------


def to_png(figure: Figure) -> bytes:
    """Panels of about 4.4 x 3 inches at 160 dots per inch. Needs matplotlib."""
    from matplotlib.lines import Line2D

    rows = figure.panels()
    across = max((len(row) for row in rows), default=1)
    columns = legend_columns([run.label for run in figure.runs], 4.4 * across)
    legend_rows = -(-len(figure.runs) // columns)
    canvas = page.canvas(4.4 * across, 3.0 * max(1, len(rows)) + 0.5 + 0.18 * legend_rows)
    axes = canvas.subplots(max(1, len(rows)), across, squeeze=False)
    for at, row in enumerate(rows):
        for ax, panel in zip(axes[at], row, strict=True):
            _draw(ax, panel)
    styles = [Line(i, run.label, [], bold=True) for i, run in enumerate(figure.runs)]
    handles = [Line2D([], [], color=s.colour, linestyle=_linestyle(s), label=s.label) for s in styles]
    canvas.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)
    return page.png(canvas, figure.title)


def legend_columns(labels: Sequence[str], inches: float) -> int:
    """At most three, as many as fit into the width: a letter of 7 points takes about 0.05 inches, the line 0.45."""
    longest = max(map(len, labels), default=1)
    return max(1, min(3, len(labels), int(inches / (0.45 + 0.05 * longest))))


def _linestyle(line: Line) -> Literal["-"] | tuple[float, Sequence[float]]:
    return (0.0, [float(length) for length in line.dash.split()]) if line.dash else "-"


def _draw(ax: Axes, panel: Panel) -> None:
    from matplotlib.ticker import NullFormatter

    ax.set_xscale("log")
    ax.set_yscale("log")
    for line in panel.lines:
        style = {"linewidth": 1.4, "marker": "o", "markersize": 3} if line.bold else {"linewidth": 0.8, "alpha": 0.6}
        ax.plot(*zip(*line.points, strict=True), color=line.colour, linestyle=_linestyle(line), **style)
    for axis, key, (low, high) in ((ax.xaxis, panel.x_key, panel.x_range), (ax.yaxis, "", panel.y_range)):
        at = ticks(low, high)
        axis.set_ticks(at, [tick_label(key, value) for value in at])
        axis.set_minor_formatter(NullFormatter())
    ax.set_xlim(panel.x_range)
    ax.set_ylim(panel.y_range)
    ax.set_xlabel(AXES[panel.x_key], fontsize=8, color=INK)
    ax.set_ylabel(panel.y_name, fontsize=8, color=INK)
    page.quiet(ax)


# --- HTML --------------------------------------------------------------------------------------------------

_CSS = f"""
svg {{ width: 100%; }}
b {{ display: inline-block; width: 1.2em; height: .25em; margin: 0 .4em .25em 1.2em; }}
text {{ font-size: 10px; fill: {MUTED}; }}
.name {{ fill: {INK}; font-size: 11px; }}
polyline {{ fill: none; }}
"""


def to_html(figure: Figure) -> str:
    """A page that stands alone. Hover over a line names the run, over a dot of validation its numbers."""
    rows = figure.panels()
    legend = "".join(
        f'<span><b style="background:{Line(i, run.label, [], True).colour}"></b>{html.escape(run.label)}</span>'
        for i, run in enumerate(figure.runs)
    )
    drawn = [
        f'<g transform="translate({column * (WIDTH + GAP)} {at * (HEIGHT + GAP)})">\n{"".join(_svg(panel))}</g>\n'
        for at, row in enumerate(rows)
        for column, panel in enumerate(row)
    ]
    across, down = max((len(row) for row in rows), default=1), max(1, len(rows))
    box = f"0 0 {across * (WIDTH + GAP)} {down * (HEIGHT + GAP)}"
    body = f'<p>{legend}</p>\n<svg viewBox="{box}">\n{"".join(drawn)}</svg>'
    return page.document(figure.title or "Runs", body, _CSS, width="72rem" if across > 1 else "44rem")


def _svg(panel: Panel) -> Iterator[str]:
    right, down = _scale(panel.x_range, LEFT, WIDTH), _scale(panel.y_range, HEIGHT - BOTTOM, 16)
    floor = HEIGHT - BOTTOM
    for value in ticks(*panel.x_range):
        x = right(value)
        yield f'<line x1="{x:.1f}" y1="16" x2="{x:.1f}" y2="{floor}" stroke="{EDGE}" stroke-width=".5"/>'
        yield f'<text x="{x:.1f}" y="{floor + 13}" text-anchor="middle">{tick_label(panel.x_key, value)}</text>\n'
    for value in ticks(*panel.y_range):
        y = down(value)
        yield f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH}" y2="{y:.1f}" stroke="{EDGE}" stroke-width=".5"/>'
        yield f'<text x="{LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">{tick_label("", value)}</text>\n'
    yield f'<text class="name" x="{LEFT}" y="10">{html.escape(panel.y_name)}</text>'
    middle = (LEFT + WIDTH) / 2
    yield f'<text class="name" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{AXES[panel.x_key]}</text>\n'
    for line in panel.lines:
        yield from _svg_line(line, right, down)


def _svg_line(line: Line, right: Callable[[float], float], down: Callable[[float], float]) -> Iterator[str]:
    every = -(-len(line.points) // PATH_POINTS)
    shown = line.points[::-1][::every][::-1]  # the last one is always among them
    path = " ".join(f"{right(x):.1f},{down(y):.1f}" for x, y in shown)
    width, faint = (2, "") if line.bold else (1, ' stroke-opacity=".6"')
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    name = html.escape(line.label)
    yield f'<polyline points="{path}" stroke="{line.colour}" stroke-width="{width}"{faint}{dash}>'
    yield f"<title>{name}</title></polyline>\n"
    for x, y in shown if line.bold else []:
        yield f'<circle cx="{right(x):.1f}" cy="{down(y):.1f}" r="2.5" fill="{line.colour}">'
        yield f"<title>{name}: {y:.4f} at {x:.4g}</title></circle>\n"


def _scale(ends: Point, first: float, last: float) -> Callable[[float], float]:
    """From a value on a logarithmic axis to a place between `first` and `last`."""
    low, high = math.log(ends[0]), math.log(ends[1])
    return lambda value: first + (last - first) * (math.log(value) - low) / (high - low)
