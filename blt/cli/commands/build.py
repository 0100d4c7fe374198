"""`blt build`: TensorRT engines from a bundle, for this machine's GPU."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, cast

import typer

from blt import files
from blt.cli import console, inputs, options
from blt.cli.bundle_tables import engines_table, parity_table
from blt_runtime.errors import MissingExtra, UsageError

HARDWARE = ("same", "ampere+")


@options.verbosity
def build(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A bundle of the flavour portable: a folder with manifest.json.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to write the engines to.")],
    profiles: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="step,prefill: engines of single streams. step,prefill,rows=N: also engines of N batched streams, "
            "for blt serve, which take as much space again.",
        ),
    ] = "step,prefill",
    workspace: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Scratch memory that TensorRT may try out in a build (default: all of the GPU)."
        ),
    ] = None,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TensorRT's measurements: read if the file exists, and written (default: kept nowhere).",
        ),
    ] = None,
    hardware: Annotated[
        str, typer.Option(help="same (this GPU's model only) or ampere+ (any GPU from Ampere on, slower).")
    ] = "same",
    fp8: Annotated[
        bool,
        typer.Option(
            "--fp8",
            help="Round the matrices of the latent transformer to 8-bit floats (E4M3): it then reads half as much.",
        ),
    ] = False,
    strip: Annotated[
        bool,
        typer.Option(
            "--strip/--keep-weights",
            help="Plans without weights, which they get when they are opened, from one copy of the bundle's.",
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check", help="Compare a stream with ONNX Runtime's CPU, and fail beyond the tolerance."
        ),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing folder of engines.")] = False,
    *,
    as_json: options.Json = False,
) -> None:
    """Build TensorRT engines from BUNDLE for the GPU of this machine. Needs no PyTorch.

    Engines run on this version of TensorRT and this kind of GPU only, and for the user who built them.
    """
    if hardware not in HARDWARE:
        raise UsageError(f"--hardware {hardware}: choose one of {', '.join(HARDWARE)}")
    limit = None if workspace is None else options.parse_size(workspace, "--workspace", at_least=1)
    if timing_cache is not None:
        files.check_folder(timing_cache)
    if not inputs.is_bundle(bundle):
        raise UsageError(f"{bundle} is no bundle: blt export MODEL -o DIR --flavour portable writes one")
    inputs.refuse_engines(bundle, "give the bundle that they were built from")
    try:
        from blt_export.build import build_engines, check_bundle, check_fp8, check_rows, check_target, rows_of
    except ModuleNotFoundError as error:
        if error.name in ("onnx", "onnx_ir"):
            raise MissingExtra(error.name, "build") from error
        raise
    from blt_runtime.backends import platform
    from blt_runtime.bundle.bundle import Bundle
    from blt_runtime.bundle.engines import Flags, Hardware

    batched = rows_of(profiles)
    opened = Bundle.open(bundle)
    check_bundle(opened)
    if batched is not None:
        check_rows(opened)
    if fp8:
        check_fp8(opened, cast(Hardware, hardware), strip=strip)
    check_target(out, force)
    here, started = platform.open_platform(), time.perf_counter()
    count = len(opened.manifest.graphs) * (1 if batched is None else 2)
    with console.named_steps("build", count + 1) as begin:
        report = build_engines(
            opened,
            out,
            here,
            batched=batched,
            flags=Flags(cast(Hardware, hardware), limit, fp8, strip),
            timing_cache=timing_cache,
            check=check,
            force=force,
            progress=begin,
        )
    seconds = time.perf_counter() - started
    if as_json:
        payload = {
            "bundle": bundle,
            "path": report.path,
            "seconds": round(seconds, 2),
            "graphs": {
                name: {"layers": report.layers[name], "seconds": report.seconds[name]} for name in report.layers
            },
            "engines": report.file.to_json(),
        }
        console.print_json("blt.build/1", payload)
        return
    console.stdout_console().print(engines_table(report.file, opened.manifest))
    if report.file.parity:
        print()
        console.stdout_console().print(parity_table(report.file.parity, "ONNX Runtime's CPU"))
    console.say(f"\n{out}: {report.file.machine}, written in {seconds:.1f} s")
