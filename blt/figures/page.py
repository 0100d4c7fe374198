"""Shared by all figures: colours, quiet axes, and a matplotlib figure as PNG or as a self-contained HTML page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from blt_runtime.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EDGE, INK, MUTED = "#c3cad3", "#1f2933", "#7b8794"
SETTINGS: dict[Any, Any] = {
    "text.parse_math": False,  # a dollar sign in a name is no formula
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "blt",  # the same figure gives the same file
}
HOVER = "hover:"


def check_kind(kind: str) -> None:
    """Raises UsageError unless `kind` is "png" or "html"."""
    if kind not in ("png", "html"):
        raise UsageError(f"a figure can be png or html, not {kind!r}")


def render(kind: str, draw: Callable[[], Figure], *, title: str, heading: str) -> bytes:
    """The matplotlib figure made by `draw`, under its title, as the bytes of a file.

    kind: "png" or "html". heading: title of a page whose figure has none. Raises UsageError for another kind.
    """
    check_kind(kind)
    from matplotlib import rc_context

    with rc_context(SETTINGS):
        figure = draw()
        if kind == "html":
            width = f"{figure.get_figwidth() * 6.5:.0f}rem"
            return document(title or heading, _svg(figure), css="svg { width: 100%; height: auto; }", width=width)
        if title:
            figure.suptitle(printable(title), fontsize=8, color=INK, x=0.012, ha="left")
        return _saved(figure, "png")


def canvas(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, 160 dots each, registered with no window. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def hover(artist: Artist, text: str) -> None:
    """Show `text` in the HTML page while the pointer is over `artist`."""
    artist.set_gid(HOVER + printable(text))


def printable(text: str) -> str:
    """The text with control characters and lone surrogates as U+FFFD; line ends stay."""
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text)


def quiet(ax: Axes) -> None:
    """A grid in the background, small grey numbers, no box."""
    ax.tick_params(labelsize=7, colors=MUTED)
    ax.grid(color=EDGE, linewidth=0.4)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def document(title: str, body: str, css: str, width: str) -> bytes:
    """A self-contained page: no script, font or image from outside. `body` is HTML; `title` is text and is escaped."""
    shown = html.escape(printable(title))
    common = f"""
:root {{ color-scheme: light; }}
body {{ margin: 2rem auto; max-width: {width}; padding: 0 1rem; background: #fff; color: {INK};
  font: 14px/1.4 system-ui, sans-serif; }}
h1 {{ font-size: 15px; font-weight: 600; white-space: pre-line; }}
""".strip()
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{shown}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>\n{common}\n{css.strip()}\n</style></head>\n'
        f"<body><h1>{shown}</h1>\n{body}\n</body></html>\n"
    )
    return page.encode()


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element for HTML, which needs no namespaces; hover texts become its <title> elements."""
    drawing = _saved(figure, "svg").decode()
    drawing = re.sub(r' xmlns(:\w+)?="[^"]*"', "", drawing[drawing.index("<svg") :])
    return re.sub(rf'<g id="{HOVER}([^"]*)">', r"<g><title>\1</title>", drawing)


def _saved(figure: Figure, kind: str) -> bytes:
    out = io.BytesIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type")) if kind == "svg" else None
    figure.savefig(out, format=kind, metadata=none)
    return out.getvalue()
