"""`blt plot`: loss and bits per byte of runs against bytes and FLOPs, as a figure, a table or JSON."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from blt.cli import console, figures, options
from blt_runtime.errors import UsageError

if TYPE_CHECKING:
    from blt.figures.metrics import Run

log = logging.getLogger("blt.cli")

COLUMNS = {"steps": ",d", "bytes": ",d", "flops": ".3e", "bpb": ".4f", "valid_bpb": ".4f", "best_valid_bpb": ".4f"}
NAMES = {"flops": "FLOPs", "bpb": "training bits/byte", "valid_bpb": "valid bits/byte", "best_valid_bpb": "best"}


@options.verbosity
def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of training runs, or their metrics.jsonl.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="OUT", help="Draw the figure, as .png or .html (default: print a table only)."
        ),
    ] = None,
    against: Annotated[
        str, typer.Option(help="Horizontal axes, separated by commas: bytes, flops, seconds, step.")
    ] = "bytes,flops",
    start: Annotated[
        str, typer.Option("--from", metavar="SIZE", help="Leave out the part of the training before this many bytes.")
    ] = "0",
    labels: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Names of the runs (default: those of the folders).")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the figure (default: none).")] = "",
    as_json: options.Json = False,
) -> None:
    """Compare training runs: loss and bits per byte against bytes and FLOPs."""
    figures.check_path(out, "-o")
    from blt.figures.metrics import read_runs

    least = options.parse_size(start, "--from")
    axes = _axes(against)
    found = read_runs(runs, None if labels is None else [label.strip() for label in labels.split(",")])
    if out is not None:
        _draw(found, out, axes=axes, title=title, least=least)
    if as_json:
        console.print_json("blt.plot/1", {"runs": [_as_json(run, axes, least) for run in found]})
    else:
        console.stdout_console().print(_table(found))


def _axes(names: str) -> list[str]:
    from blt.figures.runs import AXES

    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in AXES:
            raise UsageError(f"--against {name}: choose from {', '.join(AXES)}")
    return chosen


def _draw(runs: list[Run], out: Path, *, axes: list[str], title: str, least: int) -> None:
    from blt.figures.runs import Figure, render

    figure = Figure(runs, axes, title=title, least_bytes=least)
    if not figure.panels():
        raise UsageError(f"nothing to draw after {least:,} bytes against {', '.join(axes)}; change --from or --against")
    for axis in axes:
        without = [run.label for run in runs if not (run.points("loss", axis) or run.points("valid_bpb", axis))]
        if without:
            log.warning("not drawn against %s, which their metrics lack: %s", axis, ", ".join(without))
    figures.write(out, figure, render)


def _table(runs: list[Run]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("run")
    for name in COLUMNS:
        table.add_column(NAMES.get(name, name), justify="right")
    for run in runs:
        summary = run.summary()
        shown = ("" if summary[name] is None else format(summary[name], form) for name, form in COLUMNS.items())
        table.add_row(run.label, *shown)
    return table


def _as_json(run: Run, axes: list[str], least: int) -> dict[str, Any]:
    """The summary of a run, and for each axis its curves as pairs [x, y]."""
    keys = ("loss", "bpb", "valid_bpb")
    return run.summary() | {"curves": {axis: {key: run.points(key, axis, least) for key in keys} for axis in axes}}
