"""`blt eval`: bits per byte of a model on text, compared with classical compressors.

A document is BOS, its bytes, EOS. The model predicts every byte and the EOS, and the sum of their bits is divided by
the number of bytes, as in the validation of training. In a data folder of prompts and completions, prompts are read
but not counted.
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

import typer
from rich.table import Table

from blt.cli import console, options, scorers
from blt.cli.commands import evaluate_suite as suites
from blt.evaluate import texts
from blt_runtime.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from blt.evaluate.scoring import Scored, Scorer, Unit

ALL = ""  # key of the sum over all groups; no group has an empty name


@dataclass
class Tally:
    """Sums over the documents of a group."""

    bits: float = 0.0
    n_bytes: int = 0
    documents: int = 0
    units: int = 0
    seconds: float = 0.0
    baselines: dict[str, float] = field(default_factory=dict)

    def add(self, scored: Scored, n_bytes: int, seconds: float) -> None:
        """Adds a scored piece of `n_bytes` counted bytes, which may have ended with EOS."""
        self.bits += scored.bits
        self.n_bytes += n_bytes
        self.units += scored.units
        self.seconds += seconds

    def report(self, unit: Unit) -> dict[str, Any]:
        """The values of `--json`. For a model that reads patches or tokens (`unit`), also the mean bytes of one."""
        mean = {} if unit == "byte" else {f"bytes_per_{unit}": round(self.n_bytes / max(1, self.units), 4)}
        return {
            "bits_per_byte": round(self.bits / max(1, self.n_bytes), 5),
            "bytes": self.n_bytes,
            "documents": self.documents,
            **mean,
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
        import pyppmd  # noqa: F401  a missing library is reported before the model runs
    return chosen


@options.verbosity
@options.takes(
    options.ModelOptions, "backend", "entropy_model", "entropy_dtype", "device", *options.ON_DEVICES, "threads"
)
def evaluate(
    model: options.ModelPath,
    data: Annotated[
        Path | None, typer.Argument(metavar="DATA", help="A data folder (blt data prepare) or a file.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="train, valid or test of a data folder (default: test, else valid, else train).")
    ] = None,
    by: Annotated[str | None, typer.Option(metavar="group", help="Also print one row per group.")] = None,
    limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Read at most this much of each group (default: all).")
    ] = None,
    context: Annotated[
        str, typer.Option(metavar="SIZE", help="Longest piece in bytes; longer documents are cut.")
    ] = "4k",
    continued: Annotated[
        bool,
        typer.Option(
            "--continued",
            help="A piece of a longer document begins with the byte (or token) before it, not with BOS.",
        ),
    ] = False,
    baseline: Annotated[str | None, typer.Option(metavar="ppmd,xz", help="Compressors to compare with.")] = None,
    fail_above: Annotated[
        float | None, typer.Option(metavar="BPB", help="Fail (exit code 3) above this many bits per byte.")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="Run a suite instead of bits per byte: noise, characters or all.")
    ] = None,
    items: Annotated[
        int, typer.Option(min=1, help="With --suite: pairs of texts with noise; questions per task.")
    ] = 100,
    seed: Annotated[int, typer.Option(min=0, help="With --suite: seed of the noise and the questions.")] = 0,
    *,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Measure bits per byte, bytes per patch (or token) and bytes per second of any kind of model on text."""
    if by not in (None, "group"):
        raise UsageError(f"--by {by}: the only choice is group")
    if fail_above is not None and math.isnan(fail_above):
        raise UsageError("--fail-above nan: give a number of bits per byte")
    names = _baselines(baseline)
    size = options.parse_size(context, "--context", at_least=1)
    most = None if limit is None else options.parse_size(limit, "--limit", at_least=1)
    split = "test" if data is None else texts.choose_split(data, split)
    if suite is not None:
        _only_without_suite(
            {"--by": by, "--baseline": baseline, "--fail-above": fail_above, "--continued": continued or None}
        )
        chosen = suites.Chosen(suite=suite, items=items, seed=seed, data=data, split=split, limit=most)
        with scorers.open_scorer(model, suites.N_IDS, how) as scorer:
            suites.run(scorer, chosen, as_json)
        return
    if data is None:
        raise UsageError("name DATA: a data folder (blt data prepare) or a file")
    limited = list(texts.limited(texts.documents(data, split), most))
    if not limited:
        raise texts.no_text(data, split)
    longest = min(size, max(len(document.text) for document in limited))
    with scorers.open_scorer(model, longest + 2, how) as scorer:
        unit = scorer.unit
        if scorer.capacity is not None and scorer.capacity < longest:
            console.log.info(
                "this model reads %s bytes at once: longer documents are cut there, not at --context %s, and what "
                "begins a piece is predicted from less text", f"{scorer.capacity:,}", f"{size:,}",
            )  # fmt: skip
            longest = scorer.capacity
        tallies = _score_all(scorer, limited, longest, continued)
    _add_baselines(tallies, limited, names)
    shown = tallies if by == "group" else {ALL: tallies[ALL]}
    if as_json:
        groups = {name: tally.report(unit) for name, tally in shown.items() if name != ALL}
        console.print_json("blt.eval/1", tallies[ALL].report(unit) | ({"groups": groups} if by else {}))
    else:
        console.stdout_console().print(_table(shown, names, unit))
    _check(tallies[ALL].report(unit)["bits_per_byte"], fail_above)


def _only_without_suite(given: dict[str, object]) -> None:
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"{name} has no effect with --suite; leave it out")


def _score_all(scorer: Scorer, documents: list[texts.Document], context: int, continued: bool) -> dict[str, Tally]:
    tallies: dict[str, Tally] = defaultdict(Tally)
    total = sum(len(document.text) for document in documents)
    with console.progress("eval", total) as advance:
        for document in documents:
            for name in (document.group, ALL):
                tallies[name].documents += 1
            started = time.perf_counter()
            for scored, n_bytes in scorer.measure_pieces(document, context, continued):
                seconds = time.perf_counter() - started
                for name in (document.group, ALL):
                    tallies[name].add(scored, n_bytes, seconds)
                advance(n_bytes)
                started = time.perf_counter()
            advance(document.prompt)
    return dict(sorted(tallies.items(), key=lambda item: (item[0] == ALL, item[0])))


def _add_baselines(tallies: dict[str, Tally], documents: list[texts.Document], names: list[str]) -> None:
    """Bits per byte of each group's counted text, compressed as one file in which a NUL ends each document."""
    by_group = sorted(documents, key=lambda document: document.group)
    groups = groupby(by_group, key=lambda document: document.group)
    joined = {group: b"".join(d.text[d.prompt :] + b"\0" for d in part) for group, part in groups}
    joined[ALL] = b"".join(joined.values())
    for group, tally in tallies.items():
        for name in names:
            tally.baselines[name] = round(8 * BASELINES[name](joined[group]) / max(1, tally.n_bytes), 5)


def _table(tallies: dict[str, Tally], baselines: list[str], unit: Unit) -> Table:
    table = Table(box=None, pad_edge=False)
    mean = [] if unit == "byte" else [f"bytes/{unit}"]
    for name in ("group", "bits/byte", *baselines, "bytes", "documents", *mean, "bytes/s"):
        table.add_column(name, justify="left" if name == "group" else "right")
    for name, tally in tallies.items():
        r = tally.report(unit)
        table.add_row(
            name or "ALL",
            f"{r['bits_per_byte']:.4f}",
            *(f"{tally.baselines[b]:.4f}" for b in baselines),
            f"{r['bytes']:,}",
            f"{r['documents']:,}",
            *(f"{r[f'bytes_per_{unit}']:.2f}" for _ in mean),
            f"{r['bytes_per_s'] or 0:,.0f}",
        )
    return table


def _check(bits_per_byte: float, limit: float | None) -> None:
    if limit is not None and not bits_per_byte <= limit:  # also if it is NaN
        raise CheckFailed(f"{bits_per_byte:.4f} bits per byte is not within the limit of {limit:g} (--fail-above)")
