"""What all figures share: the colours, the choice between PNG and HTML, a page that stands alone, quiet axes."""

from __future__ import annotations

import html
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from blt_runtime.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EDGE, INK, MUTED = "#c3cad3", "#1f2933", "#7b8794"


def drawn(kind: str, to_png: Callable[[], bytes], to_html: Callable[[], str]) -> bytes:
    """The figure as the bytes of a file; kind is "png" or "html". Raises UsageError for another."""
    if kind == "html":
        return to_html().encode()
    if kind == "png":
        return to_png()
    raise UsageError(f"a figure can be png or html, not {kind!r}")


def canvas(width: float, height: float) -> Figure:
    """An empty figure of so many inches, 160 dots each, that no window knows of. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure, title: str) -> bytes:
    """The figure under its title, as the bytes of a PNG file."""
    if title:
        figure.suptitle(title, fontsize=8, color=INK, x=0.012, ha="left")
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def quiet(ax: Axes) -> None:
    """A grid in the background, small grey numbers, no box."""
    ax.tick_params(labelsize=7, colors=MUTED)
    ax.grid(color=EDGE, linewidth=0.4)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def document(title: str, body: str, css: str, width: str = "52rem") -> str:
    """A page that stands alone: no script, no font, no image from outside. `body` is HTML, `title` is not yet."""
    shown = html.escape(title)
    common = f"""
:root {{ color-scheme: light; }}
body {{ margin: 2rem auto; max-width: {width}; padding: 0 1rem; background: #fff; color: {INK};
  font: 14px/1.4 system-ui, sans-serif; }}
h1 {{ font-size: 15px; font-weight: 600; }}
""".strip()
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{shown}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>\n{common}\n{css.strip()}\n</style></head>\n'
        f"<body><h1>{shown}</h1>\n{body}\n</body></html>\n"
    )
