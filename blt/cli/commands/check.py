"""`blt check`: compares the cached forms of a model with whole rows, in every order of calls."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from blt.cli import console, devices, inputs, models, options
from blt.cli.commands import check_provider
from blt_runtime.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from blt.checkpoint.models import Checkpoint
    from blt.evaluate.cache_check import Line, Report
    from blt_runtime import Model

FORMS = ("torch", "onnx")
ROOM = 400
"""Ids that a stream can hold beyond a row, because prompts of greedy text may be longer than short rows."""


@options.verbosity
@options.takes(options.ModelOptions, "entropy_model", "entropy_dtype", *options.ON_DEVICES, "threads")
def check(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            callback=options.existing_model,
            help="A checkpoint; with --provider, a bundle; or engines.",
        ),
    ],
    n_bytes: Annotated[
        str | None,
        typer.Option(
            "--bytes",
            metavar="SIZE",
            help="Bytes of text compared under the model's own patch rule (default: 100k; with --provider, 64).",
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend", metavar="FORMS", help="Cached forms to compare with whole rows: torch, onnx or torch,onnx."
        ),
    ] = "torch,onnx",
    bundle: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A bundle exported from MODEL (default: a temporary one).")
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="Text to compare on (default: generated).")] = None,
    row_bytes: Annotated[str, typer.Option("--row-bytes", metavar="SIZE", help="Length of a row in bytes.")] = "2k",
    reference: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            callback=options.existing_model,
            help="A bundle or engines on a device: compare with this checkpoint or bundle on the CPU (default: MODEL).",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the text, the cuts and the order of calls.")] = 0,
    *,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Compare cached streams, alone and interleaved, with whole rows: entropies, boundaries, logits, greedy text.

    With --provider: compare a bundle on a device with the CPU. TensorRT engines: with a reference on the CPU.
    """
    from blt.evaluate.cache_check import check as compare

    if how.provider != "cpu" or inputs.is_engines(model):
        size = options.parse_size(n_bytes or check_provider.USUAL_BYTES, "--bytes", at_least=1)
        check_provider.run(model, how, reference, size, None if data is None else _text(data), as_json)
        return
    if reference is not None:
        raise UsageError("--reference is for --provider: a checkpoint is compared with its own whole rows")
    models.check_for_checkpoint(model, replace(how, backend="onnx"))
    forms = _forms(backend, model, bundle)
    if how.entropy_dtype == "bfloat16" and "onnx" in forms:
        raise UsageError("--entropy-dtype bfloat16: a bundle computes entropies in float32; add --backend torch")
    amount = options.parse_size(n_bytes or "100k", "--bytes", at_least=1)
    row = options.parse_size(row_bytes, "--row-bytes", at_least=1)
    text = None if data is None else _text(data)
    started = time.monotonic()
    with (
        _open(model, forms, bundle, how=how, capacity=row + ROOM) as (checkpoint, candidates),
        console.progress("check", 1.0) as advance,
    ):
        report = compare(checkpoint, candidates, amount, row_bytes=row, seed=seed, data=text, progress=advance)
    seconds = round(time.monotonic() - started, 1)
    if as_json:
        console.print_json("blt.check/1", {"ok": report.ok, **_finite(asdict(report)), "seconds": seconds})
    else:
        console.stdout_console().print(_table(report, seconds))
    _demand(report)


def _forms(backend: str, model: Path, bundle: Path | None) -> list[str]:
    forms = [name.strip() for name in backend.split(",")]
    for name in forms:
        if name not in FORMS:
            raise UsageError(f"--backend {name}: choose from {', '.join(FORMS)}")
    if inputs.is_bundle(model):
        raise UsageError(f"{model} is a bundle; give the checkpoint it was exported from, and --bundle {model}")
    if bundle is not None and not inputs.is_bundle(bundle):
        raise UsageError(f"--bundle {bundle}: no bundle there; blt export makes one")
    if bundle is not None:
        inputs.refuse_engines(bundle, f"blt check {bundle} --reference {model} compares them")
    if bundle is not None and "onnx" not in forms:
        raise UsageError("--bundle needs --backend onnx; --backend torch reads the checkpoint only")
    return forms


def _text(file: Path) -> bytes:
    if not file.is_file():
        raise UsageError(f"--data {file}: no such file")
    if text := file.read_bytes():
        return text
    raise UsageError(f"--data {file}: the file is empty")


@contextmanager
def _open(
    path: Path, forms: list[str], bundle: Path | None, *, how: options.ModelOptions, capacity: int
) -> Iterator[tuple[Checkpoint, dict[str, Model]]]:
    """The checkpoint and its cached forms. The export runs first, so that its memory is free before the rest loads."""
    from blt.checkpoint.models import load
    from blt.generate.torch_backend import open_model

    devices.limit_torch_threads(how.threads)
    with ExitStack() as stack:
        candidates = {}
        if "onnx" in forms:
            on_onnx = replace(how, backend="onnx")
            if bundle is not None:  # it holds its own entropy model
                on_onnx = replace(on_onnx, entropy_model=None)
            candidates["onnx"] = stack.enter_context(models.open_model(bundle or path, on_onnx, capacity))
        checkpoint = load(path, entropy_model=how.entropy_model, entropy_dtype=how.entropy_dtype)
        if "torch" in forms:
            candidates["torch"] = open_model(checkpoint, capacity=capacity)
        yield checkpoint, {name: candidates[name] for name in forms}


def _table(report: Report, seconds: float) -> Table:
    title = (
        f"{report.n_bytes:,} bytes in {report.rows} rows of up to {report.longest_row:,} ids, patches of up to "
        f"{report.longest_patch:,}, tolerance {report.lines[0].tolerance:g}, seed {report.seed}, {seconds:,.0f} s"
    )
    table = Table(title=title, title_justify="left")
    for name in ("form", "how"):
        table.add_column(name, no_wrap=True)
    for name in ("positions", "entropies", "logits", "near", "moved", "ties", "parted", "failures"):
        table.add_column(name, justify="right")
    for line in report.by_how():
        counts = (line.near, line.moved, line.ties, line.parted, line.failures)
        worst = (_error(line.entropy_error), _error(line.logit_error))
        table.add_row(line.form, line.how, f"{line.positions:,}", *worst, *(f"{count:,}" for count in counts))
    return table


def _finite(value: Any) -> Any:
    """`value` with infinite errors as the string "inf", because JSON has no infinity."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return "inf" if value == math.inf else value


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}" if value else "0"


def _demand(report: Report) -> None:
    """Raises CheckFailed with the first failure. The log names the first failure of every line."""
    failed = [line for line in report.lines if line.failures]
    for line in failed:
        console.log.warning("%s: %d failures, first: %s", _name(line), line.failures, line.first_failure)
    if failed:
        first = failed[0]
        raise CheckFailed(
            f"{report.failures} differences that the tolerance does not explain; {_name(first)}: {first.first_failure}"
        )
    if not report.ok:
        raise CheckFailed("one line of the table compared no position: use more --bytes")


def _name(line: Line) -> str:
    return f"{line.form}, {line.how}"
