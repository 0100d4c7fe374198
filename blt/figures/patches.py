"""The paper's figure: entropy of the next byte as bars over the text, the threshold, the patch boundaries.

The bar over byte t shows how uncertain the entropy model was about byte t before reading it: e[t-1] in nats. Long text
wraps into rows. `render` makes PNG (matplotlib, 64 bytes a row) or HTML.

The HTML page is not matplotlib's SVG, because that would lose three things: rows that wrap at the width of the window,
text in any script in the browser's fonts, and texts of any length (matplotlib lays out one axis per 64 bytes).
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from blt.figures import page
from blt.figures.page import EDGE, INK, MUTED
from blt_runtime.ids import OFFSET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

ROW = 64  # bytes per row: 64 monospaced letters are readable at the width of a page
BAR, BAR_START, THRESHOLD = "#9db7d5", "#d9822b", "#b3261e"
BANDS = ("#ffffff", "#f1f4f8")
SPECIAL = ("BOE", "BOS", "EOS", "BPE")  # names of the ids below OFFSET
WEAK = "␣↵⇥·"  # labels that are no letter, drawn in grey
BLANKS = {" ": "␣", "\n": "↵", "\t": "⇥"}


@dataclass(frozen=True)
class Figure:
    """The content of the figure.

    ids [N]; entropies [N] in nats, of the byte after each id, or None; starts: indices of the ids that start a patch;
    threshold in nats, or None if the rule has none.
    """

    ids: Sequence[int]
    entropies: Sequence[float] | None
    _: KW_ONLY
    starts: frozenset[int]
    threshold: float | None
    title: str = ""

    def before(self, t: int) -> float:
        """Entropy in nats of id t, given the ids before it; 0 for the first."""
        return float(self.entropies[t - 1]) if self.entropies is not None and t > 0 else 0.0


def glyphs(ids: Sequence[int], drawable: Callable[[str], bool] = str.isprintable) -> list[str]:
    """One label per id: the character at its first byte, a dot at each of its other bytes.

    Spaces show as `␣`, line ends as `↵`, tabs as `⇥`. Control characters, invalid bytes and characters that are not
    `drawable` show as `x1f`, byte by byte. Special ids show by name.
    """
    labels: list[str] = []
    for is_text, run in _runs(ids):
        if is_text:
            labels += _text_glyphs(bytes(i - OFFSET for i in run), drawable)
        else:
            labels += [SPECIAL[i] for i in run]
    return labels


def _runs(ids: Sequence[int]) -> Iterator[tuple[bool, list[int]]]:
    run: list[int] = []
    for i in ids:
        if run and (run[0] >= OFFSET) != (i >= OFFSET):
            yield run[0] >= OFFSET, run
            run = []
        run.append(i)
    if run:
        yield run[0] >= OFFSET, run


def _text_glyphs(data: bytes, drawable: Callable[[str], bool]) -> list[str]:
    labels: list[str] = []
    for char in data.decode("utf-8", "surrogateescape"):
        raw = char.encode("utf-8", "surrogateescape")
        shown = BLANKS.get(char, char)
        if "\udc80" <= char <= "\udcff" or not (shown.isprintable() and drawable(shown)):
            labels += [f"x{byte:02x}" for byte in raw]
        else:
            labels += [shown] + ["·"] * (len(raw) - 1)
    return labels


def render(figure: Figure, kind: str) -> bytes:
    """The figure as the bytes of a file; kind is "png" or "html". Raises UsageError for another."""
    page.check_kind(kind)
    if kind == "html":
        return _to_html(figure)
    return page.render("png", lambda: _draw(figure), title=figure.title, heading="Patches")


# --- PNG ---------------------------------------------------------------------------------------------------


def _draw(figure: Figure) -> Canvas:
    """Rows of 64 bytes, about 1,900 pixels wide."""
    n = len(figure.ids)
    width = min(n, ROW)
    n_rows = max(1, math.ceil(n / ROW))
    canvas = page.canvas(max(4.0, 0.175 * width + 0.9), 1.5 * n_rows + 0.55)
    axes = canvas.subplots(n_rows, 1, squeeze=False)[:, 0]
    labels, top = glyphs(figure.ids, _in_font()), _top(figure)
    for row, ax in enumerate(axes):
        _draw_row(ax, figure, labels, span=range(row * ROW, min(n, (row + 1) * ROW)), width=width, top=top)
    return canvas


def _in_font() -> Callable[[str], bool]:
    """True for the characters in matplotlib's monospaced font; the others would become boxes."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family="monospace")))
    return lambda char: bool(font.get_char_index(ord(char)))


def _top(figure: Figure) -> float:
    highest = max((figure.before(t) for t in range(len(figure.ids))), default=0.0)
    return 1.08 * max(highest, figure.threshold or 0.0, 0.5)


def _draw_row(ax: Axes, figure: Figure, labels: list[str], span: range, width: int, top: float) -> None:
    first, end = span.start, len(span) - 0.5
    for column, t in enumerate(span):
        opens = t in figure.starts
        ax.bar(column, figure.before(t), width=0.78, color=BAR_START if opens else BAR, linewidth=0, zorder=2)
        if opens:
            ax.axvline(column - 0.5, color=EDGE, linewidth=0.9, zorder=1)
    if figure.threshold is not None:
        _threshold_line(ax, figure.threshold, end, say=first == 0)
    ax.set_xlim(-0.5, width - 0.5)
    ax.set_ylim(0, top)
    ax.set_xticks(range(len(span)), labels[first : span.stop], family="monospace")
    for t, tick in zip(span, ax.get_xticklabels(), strict=True):
        long = len(labels[t]) > 1
        weak = long or labels[t] in WEAK
        tick.set(fontsize=5 if long else 9, rotation=90 if long else 0, color=MUTED if weak else INK)
    ax.tick_params(axis="x", length=0, pad=2)
    ax.tick_params(axis="y", length=2, labelsize=6, colors=MUTED)
    ax.set_ylabel("nats", fontsize=6, color=MUTED)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(EDGE)
    ax.spines["bottom"].set_bounds(-0.5, end)


def _threshold_line(ax: Axes, threshold: float, end: float, say: bool) -> None:
    ax.hlines(threshold, -0.5, end, color=THRESHOLD, linewidth=0.9, linestyle=(0, (5, 3)), zorder=3)
    if say:
        ax.text(end, threshold, f" {threshold:.3g}", color=THRESHOLD, fontsize=6, va="center", clip_on=False)


# --- HTML --------------------------------------------------------------------------------------------------

_CSS = f"""
.legend {{ color: {MUTED}; margin-bottom: 1.2rem; }}
.legend b {{ display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }}
.text {{ display: flex; flex-wrap: wrap; align-items: flex-end; row-gap: 14px; }}
.scale {{ position: relative; width: 30px; height: 84px; margin-bottom: 22px; font-size: 9px; color: {MUTED}; }}
.scale i {{ position: absolute; right: 4px; transform: translateY(50%); font-style: normal; }}
.scale i::after {{ content: ""; position: absolute; left: calc(100% + 1px); top: 50%; width: 3px;
  border-top: 1px solid {MUTED}; }}
.byte {{ position: relative; width: 15px; }}
.byte.start {{ box-shadow: -1px 0 0 {EDGE}; }}
.bars {{ position: relative; height: 84px; border-bottom: 1px solid {EDGE};
  background: linear-gradient(to top, {EDGE}80 1px, transparent 1px) 0 100% / 100% var(--tick); }}
.bar {{ position: absolute; bottom: 0; left: 2px; right: 2px; background: {BAR}; border-radius: 1px 1px 0 0; }}
.start .bar {{ background: {BAR_START}; }}
.line {{ position: absolute; left: 0; right: 0; border-top: 1px dashed {THRESHOLD}; }}
.glyph {{ height: 22px; text-align: center; font: 14px/22px ui-monospace, monospace; white-space: pre; }}
.glyph.weak {{ color: {MUTED}; }}
.glyph.small {{ font-size: 8px; letter-spacing: -.5px; }}
.odd {{ background: {BANDS[1]}; }}
.byte:hover {{ outline: 1px solid {INK}; }}
""".strip()


def _to_html(figure: Figure) -> bytes:
    """A self-contained page. Hovering over a byte shows its number, patch and entropy."""
    labels, top = glyphs(figure.ids), _top(figure)
    patch, cells = -1, []
    for t, label in enumerate(labels):
        patch += t in figure.starts
        cells.append(_cell(figure, t, label=label, patch=patch, top=top))
    legend = f'<b style="background:{BAR_START}"></b>first byte of a patch<b style="background:{BAR}"></b>other bytes'
    if figure.threshold is not None:
        legend += f'<b style="height:0;border-top:1px dashed {THRESHOLD}"></b>threshold {figure.threshold:.4g} nats'
    tick = _tick(top)
    body = (
        f'<div class="legend">entropy of each byte before it is read, in nats{legend}</div>\n'
        f'<div class="text" style="--tick:{100 * tick / top:.2f}%">\n{_scale(top, tick)}{"".join(cells)}</div>'
    )
    return page.document(figure.title or "Patches", body, _CSS, width="76rem")


def _tick(top: float) -> float:
    """A round number of nats that divides the scale up to `top` into at most six parts."""
    power = 10.0 ** math.floor(math.log10(top / 6))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= top / 6)


def _scale(top: float, tick: float) -> str:
    """The numbers of the y scale, in nats, before the first byte. Faint lines continue them in every row of bytes."""
    marks = "".join(
        f'<i style="bottom:{100 * n * tick / top:.1f}%">{n * tick:g}</i>' for n in range(math.floor(top / tick) + 1)
    )
    return f'<div class="scale" title="nats">{marks}</div>\n'


def _cell(figure: Figure, t: int, label: str, patch: int, top: float) -> str:
    nats = figure.before(t)
    classes = "byte" + (" start" if t in figure.starts else "") + (" odd" if patch % 2 else "")
    glyph = "glyph" + (" weak" if label in WEAK or len(label) > 1 else "") + (" small" if len(label) > 1 else "")
    line = ""
    if figure.threshold is not None:
        line = f'<i class="line" style="bottom:{100 * figure.threshold / top:.1f}%"></i>'
    return (
        f'<div class="{classes}" title="byte {t}, patch {patch}: {nats:.3f} nats"><div class="bars">'
        f'<i class="bar" style="height:{100 * nats / top:.1f}%"></i>{line}</div>'
        f'<div class="{glyph}">{html.escape(label)}</div></div>\n'
    )
