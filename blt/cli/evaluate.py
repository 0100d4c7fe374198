"""`blt eval`: bits per byte of a model on text, beside classical compressors.

A document is BOS, its bytes, EOS; every byte and the EOS are predicted, and the sum of their bits is divided by the
number of bytes: the same count as the training's validation.
"""

from __future__ import annotations

import lzma
import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.table import Table

from blt.cli import console, options, scoring, texts
from blt_runtime.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from blt_runtime import Score

ALL = ""  # the sum over all groups; no group has an empty name


@dataclass
class Tally:
    """Sums over documents."""

    bits: float = 0.0
    n_bytes: int = 0
    documents: int = 0
    patches: int = 0
    seconds: float = 0.0
    baselines: dict[str, float] = field(default_factory=dict)

    def add(self, score: Score, seconds: float) -> None:
        """`score` is of one piece: BOS, bytes and maybe EOS."""
        self.bits += scoring.bits_of(score.logits, score.ids)
        self.n_bytes += int((score.ids >= 4).sum())
        starts_P = np.cumsum(score.patch_lengths)[:-1]
        self.patches += int((starts_P < len(score.ids)).sum())
        self.seconds += seconds

    def report(self) -> dict[str, Any]:
        return {
            "bits_per_byte": round(self.bits / self.n_bytes, 5),
            "bytes": self.n_bytes,
            "documents": self.documents,
            "bytes_per_patch": round(self.n_bytes / max(1, self.patches), 4),
            "bytes_per_s": round(self.n_bytes / self.seconds, 1) if self.seconds else None,
            **({"baselines": self.baselines} if self.baselines else {}),
        }


def _xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def _ppmd(data: bytes) -> int:
    import pyppmd

    return len(pyppmd.compress(data, max_order=8, mem_size=128 << 20))


BASELINES: dict[str, Callable[[bytes], int]] = {"ppmd": _ppmd, "xz": _xz}


def _baselines(names: str | None) -> list[str]:
    chosen = [name.strip() for name in names.split(",")] if names else []
    for name in chosen:
        if name not in BASELINES:
            raise UsageError(f"--baseline {name}: choose from {', '.join(BASELINES)}")
    if "ppmd" in chosen:
        import pyppmd  # noqa: F401  a missing one is reported before the model runs
    return chosen


def evaluate(
    model: options.ModelPath,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder made by blt data prepare, or a file.")],
    split: Annotated[str, typer.Option(help="train, valid or test of a data folder.")] = "test",
    by: Annotated[str | None, typer.Option(metavar="group", help="One row per group.")] = None,
    limit: Annotated[str | None, typer.Option(metavar="SIZE", help="At most so many bytes of each group.")] = None,
    context: Annotated[str, typer.Option(metavar="SIZE", help="Longer documents are cut into pieces.")] = "4k",
    baseline: Annotated[str | None, typer.Option(metavar="ppmd,xz", help="Compressors to compare with.")] = None,
    fail_above: Annotated[float | None, typer.Option(metavar="BPB", help="Exit 3 above so many bits per byte.")] = None,
    backend: options.Backend = "auto",
    entropy_model: options.EntropyModel = None,
    entropy_dtype: options.EntropyDtype = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Bits per byte, bytes per patch and bytes per second of a model on text."""
    if by not in (None, "group"):
        raise UsageError(f"--by {by}: only group is known")
    if fail_above is not None and math.isnan(fail_above):
        raise UsageError("--fail-above nan: give a number of bits per byte")
    names = _baselines(baseline)
    size = options.parse_size(context, "--context", at_least=1)
    most = None if limit is None else options.parse_size(limit, "--limit", at_least=1)
    limited = list(texts.limited(texts.documents(data, split), most))
    if not limited:
        raise texts.nothing(data, split)
    with scoring.open_scorer(
        model,
        size + 2,
        backend=backend,
        entropy_model=entropy_model,
        device=device,
        threads=threads,
        entropy_dtype=entropy_dtype,
    ) as scorer:
        tallies = _score_all(scorer, limited, min(size, scorer.capacity - 2))
    _add_baselines(tallies, limited, names)
    shown = tallies if by == "group" else {ALL: tallies[ALL]}
    if as_json:
        groups = {name: tally.report() for name, tally in shown.items() if name != ALL}
        console.print_json("blt.eval/1", tallies[ALL].report() | ({"groups": groups} if by else {}))
    else:
        console.stdout_console().print(_table(shown, names))
    _check(tallies[ALL].report()["bits_per_byte"], fail_above)


def _score_all(scorer: scoring.Scorer, documents: list[texts.Document], context: int) -> dict[str, Tally]:
    tallies: dict[str, Tally] = defaultdict(Tally)
    total = sum(len(text) for _, text in documents)
    with console.progress("eval", total) as advance:
        for group, text in documents:
            for name in (group, ALL):
                tallies[name].documents += 1
            for ids in texts.pieces(text, context):
                started = time.perf_counter()
                score = scorer(ids, None)
                seconds = time.perf_counter() - started
                for name in (group, ALL):
                    tallies[name].add(score, seconds)
                advance(len(ids) - 1)
    return dict(sorted(tallies.items(), key=lambda item: (item[0] == ALL, item[0])))


def _add_baselines(tallies: dict[str, Tally], documents: list[texts.Document], names: list[str]) -> None:
    """Each group compressed as one file, documents ended by NUL; bits per byte of text."""
    by_group = sorted(documents, key=lambda document: document[0])
    joined = {g: b"".join(t + b"\0" for _, t in part) for g, part in groupby(by_group, key=lambda d: d[0])}
    joined[ALL] = b"".join(joined.values())
    for group, tally in tallies.items():
        for name in names:
            tally.baselines[name] = round(8 * BASELINES[name](joined[group]) / tally.n_bytes, 5)


def _table(tallies: dict[str, Tally], baselines: list[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("group", "bits/byte", *baselines, "bytes", "documents", "bytes/patch", "bytes/s"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for name, tally in tallies.items():
        r = tally.report()
        table.add_row(
            name or "ALL",
            f"{r['bits_per_byte']:.4f}",
            *(f"{tally.baselines[b]:.4f}" for b in baselines),
            f"{r['bytes']:,}",
            f"{r['documents']:,}",
            f"{r['bytes_per_patch']:.2f}",
            f"{r['bytes_per_s'] or 0:,.0f}",
        )
    return table


def _check(bits_per_byte: float, limit: float | None) -> None:
    if limit is not None and not bits_per_byte <= limit:  # also if it is NaN
        raise CheckFailed(f"{bits_per_byte:.4f} bits per byte is not within the limit of {limit:g} (--fail-above)")
