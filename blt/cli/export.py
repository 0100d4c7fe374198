"""`blt export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blt.cli import console, models, options
from blt.cli.inspect import parity_table
from blt_runtime.errors import UsageError

FLAVOURS = ("ort", "portable")


def export(
    model: options.ModelPath,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the bundle.")],
    flavour: Annotated[str, typer.Option(help="ort (fastest on ONNX Runtime) or portable (also TensorRT).")] = "ort",
    precision: Annotated[str, typer.Option(help="fp32 is the one there is.")] = "fp32",
    table_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE", help="Hash tables as float32, float16 or bfloat16 (default: as in the checkpoint)."
        ),
    ] = None,
    capacity: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes that one stream can hold (default: the trained length).")
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare with PyTorch; fail if too far.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an older bundle.")] = False,
    entropy_model: options.EntropyModel = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Write MODEL as ONNX graphs with everything that a runtime needs, and compare them with PyTorch."""
    if flavour not in FLAVOURS:
        raise UsageError(f"--flavour {flavour}: choose one of {', '.join(FLAVOURS)}")
    size = None if capacity is None else options.parse_size(capacity, "--capacity", at_least=1)
    models.existing(model)
    if models.is_bundle(model):
        raise UsageError(f"{model} is a bundle already; give the checkpoint it was made from")
    import blt_export  # first: where PyTorch is missing too, the extra to install is `export`
    from blt.checkpoint import load

    loaded = load(model, entropy_model=entropy_model)
    report = blt_export.export(
        loaded,
        out,
        flavour=flavour,
        precision=precision,
        capacity=size,
        check=check,
        force=force,
        table_dtype=table_dtype,
    )
    if as_json:
        console.print_json("blt.export/1", {"bundle": out, "seconds": round(report.seconds, 2), **report.to_json()})
        return
    if report.parity:
        console.stdout_console().print(parity_table(report.parity))
    print(f"{out}: {report.bytes:,} bytes, {flavour}, {precision}, made in {report.seconds:.1f} s")
