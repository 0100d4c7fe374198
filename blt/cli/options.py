"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from blt.cli import console, models
from blt_runtime import patching
from blt_runtime.errors import UsageError

_UNITS = {"": 1, "k": 1 << 10, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def parse_size(text: str, option: str, at_least: int = 0) -> int:
    """`4096`, `4k`, `4K`, `1.5M`, `2G` as a whole number; k is 1024.

    Raises UsageError that names `option` for anything else, and for less than `at_least`.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)([kKMG]?)", text.strip())
    if not match:
        raise UsageError(f"{option}: {text!r} is not a size; write a number with k, K, M or G behind it, as in 4k")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size < at_least:
        raise UsageError(f"{option} {text}: must be at least {at_least}")
    return size


def _quiet(value: bool) -> bool:
    if value:
        console.set_verbosity(-1)
    return value


def _verbose(value: int) -> int:
    if value:
        console.set_verbosity(value)
    return value


def _existing(path: Path | None) -> Path | None:
    return None if path is None else models.existing(path)


Quiet = Annotated[bool, typer.Option("-q", "--quiet", callback=_quiet, help="Warnings and errors only.")]
Verbose = Annotated[
    int, typer.Option("-v", "--verbose", count=True, callback=_verbose, help="More output, tracebacks.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="model.pt, a run folder, a folder in the reference's or Hugging Face's format, a hub name, or a bundle.",
    ),
]
EntropyModel = Annotated[
    Path | None,
    typer.Option(
        "--entropy-model",
        metavar="PATH",
        callback=_existing,
        help="Entropy model, where MODEL's format keeps it apart.",
    ),
]
EntropyDtype = Annotated[
    patching.EntropyDtype | None,
    typer.Option(
        "--entropy-dtype",
        help="float32, or bfloat16: entropies and threshold as the reference's loader computes them (PyTorch only).",
    ),
]
Precision = Annotated[
    str | None, typer.Option("--precision", help="Refuse a MODEL that does not run at this one: fp32, int8 or int4.")
]
Backend = Annotated[str, typer.Option("--backend", help="auto, torch or onnx.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda[:n].")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads (default: all cores).")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the sampling.")]
