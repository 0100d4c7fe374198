"""`blt bench`: how fast a model runs on this machine, and how close that is to the limit set by memory bandwidth.

Not here: the measurements (`blt.bench`), and `blt bench throughput` (`bench_throughput`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.table import Table

from blt.cli import console, figures, inputs, models, options
from blt.cli.bundle_tables import precision_text
from blt_runtime.errors import InputError, UsageError

if TYPE_CHECKING:
    from blt.bench import Latency, Weights
    from blt_runtime import Model
    from blt_runtime.speculation.speculate import Speculate, SpeculationStats

PARTS_OF = {  # part of a checkpoint -> the same part in the split of the time
    "hash tables": "hashing",
    "entropy model": "entropy",
    "local encoder": "encoder",
    "latent transformer": "latent",
    "local decoder": "decoder",
}

app = typer.Typer(no_args_is_help=True, help="Measure how fast a model runs on this machine.")

TextFile = Annotated[
    Path | None,
    typer.Option("--text", metavar="FILE", help="Text to use (default: English words, the same in every run)."),
]
PatchSize = Annotated[
    float | None,
    typer.Option(
        "--patch-size", min=1.0, help="Choose a threshold that gives this mean patch size (default: keep the model's)."
    ),
]
Repeat = Annotated[int, typer.Option(min=1, help="Number of runs, whose medians are shown.")]


@app.command("latency")
@options.verbosity
@options.takes(options.ModelOptions, "backend", "precision", "entropy_model", *options.ON_DEVICES, "threads")
def latency(
    model: options.ModelPath,
    prompt_bytes: Annotated[
        str | None,
        typer.Option("--prompt-bytes", metavar="SIZE", help="Bytes of the prompt (default: 512, or what fits)."),
    ] = None,
    new_bytes: Annotated[
        str | None, typer.Option("--new-bytes", metavar="SIZE", help="Bytes to generate (default: 128, or what fits).")
    ] = None,
    repeat: Repeat = 3,
    patch_size: PatchSize = None,
    temperature: options.Temperature = 0.8,
    speculate: options.Speculate = "off",
    text: TextFile = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Draw where the time goes, as .png or .html.")
    ] = None,
    *,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Measure one stream: bytes per second, gaps between bytes, and the share of the memory bandwidth it reaches."""
    from blt import bench
    from blt.bench.machine import available_cores

    wanted = Lengths.of(prompt_bytes, new_bytes, usual=(512, 128), least_new=2)
    figures.check_path(plot)
    data = read_text(text, wanted.total)
    began = time.perf_counter()
    with models.open_model(model, how) as opened:
        open_s = time.perf_counter() - began
        given = bench.Text.of(data, *wanted.fitting(min(opened.spec.capacity_bytes - 1, len(data))))
        if patch_size is not None:
            opened = bench.at_patch_size(opened, [given], patch_size)
        found = bench.latency(
            opened,
            given,
            _weights(opened, model, how.entropy_model),
            repeat=repeat,
            temperature=temperature,
            threads=how.threads or available_cores(),
            speculate=cast("Speculate", speculate),
        )
        report = {
            **setting(opened, model, "latency"),
            "provider": getattr(opened.backend, "provider", None),
            "captured_graphs": _captured(opened),
            "open_s": open_s,
            **latency_report(found),
        }
    if plot is not None:
        _plot(found, f"{model} on {report['backend']}, {_place(report)}", plot)
    if as_json:
        console.print_json("blt.bench/1", report)
        return
    _show(report, found)


@app.command("patch")
@options.verbosity
@options.takes(options.ModelOptions, "backend", "precision", "entropy_model", *options.ON_DEVICES, "threads")
def patch(
    model: options.ModelPath,
    prompt_bytes: Annotated[
        str | None,
        typer.Option("--prompt-bytes", metavar="SIZE", help="Bytes of text to patch (default: 512, or what fits)."),
    ] = None,
    repeat: Repeat = 3,
    text: TextFile = None,
    *,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Measure patching alone: the entropies of a text, then the patch rule."""
    from blt import bench

    wanted = Lengths.of(prompt_bytes, None, usual=(512, 0), least_new=0)
    data = read_text(text, wanted.total)
    with models.open_model(model, how) as opened:
        size, _ = wanted.fitting(min(opened.spec.capacity_bytes - 1, len(data)))
        if len(data) < size:
            raise InputError(f"{text} has {len(data):,} bytes, the run needs {size:,}: see --prompt-bytes")
        found = bench.patching(opened, data[:size], repeat)
        report = {
            **setting(opened, model, "patch"),
            "bytes": found.n,
            "repeat": repeat,
            "bytes_per_s": found.bytes_per_s,
            "entropies_s": found.entropies_s,
            "rule_s": found.rule_s,
            "mean_patch_bytes": found.mean_patch,
        }
    if as_json:
        console.print_json("blt.bench/1", report)
        return
    print(
        f"{found.bytes_per_s:,.0f} bytes/s: {found.n:,} bytes, entropies {1e3 * found.entropies_s:.3g} ms, "
        f"rule {1e3 * found.rule_s:.3g} ms, mean patch {found.mean_patch:.2f} bytes"
    )


@dataclass(frozen=True)
class Lengths:
    """Bytes of prompt and new bytes of a run. None: the `usual` number, or what fits."""

    prompt: int | None
    new: int | None
    usual: tuple[int, int]
    least_new: int

    @classmethod
    def of(cls, prompt: str | None, new: str | None, *, usual: tuple[int, int], least_new: int) -> Lengths:
        """Reads the options. Raises UsageError for what is no size, or too small."""
        given = None if prompt is None else options.parse_size(prompt, "--prompt-bytes", at_least=1)
        generated = None if new is None else options.parse_size(new, "--new-bytes", at_least=least_new)
        return cls(given, generated, usual, least_new)

    @property
    def total(self) -> int:
        """Bytes of text to read."""
        return (self.prompt or self.usual[0]) + (self.new or self.usual[1])

    def fitting(self, room: int) -> tuple[int, int]:
        """Prompt and new bytes in a model or text with room for so many in total. Less than usual is logged. A size
        that was given stays, whether it fits or not."""
        usual_prompt, usual_new = self.usual
        new = self.new
        if new is None:
            share = room * usual_new // (usual_prompt + usual_new)
            new = usual_new if self.prompt is not None else min(usual_new, max(self.least_new, share))
        prompt = self.prompt if self.prompt is not None else max(1, min(usual_prompt, room - new))
        if (self.prompt is None and prompt < usual_prompt) or (self.new is None and new < usual_new):
            generated = f" and {new:,} new ones" if new else ""
            console.log.info("there is room for %s bytes: measuring with a prompt of %s%s", room, prompt, generated)
        return prompt, new


# --- parts -------------------------------------------------------------------------------------------------


def read_text(path: Path | None, size: int) -> bytes:
    """The first `size` bytes of a file (all of a shorter one), or of the built-in text."""
    from blt.bench import bench_text

    if path is None:
        return bench_text(size)
    if not path.is_file():
        raise UsageError(f"--text {path}: no such file")
    with path.open("rb") as file:
        return file.read(size)


def _weights(opened: Model, path: Path, entropy_model: Path | None) -> Weights:
    """Weight bytes that one call of each part reads.

    From a bundle's files, or from a checkpoint's configuration. A temporary bundle counts as its checkpoint: both are
    float32. Empty for engines, whose weights are part of their code.
    """
    from blt.bench import weight_bytes
    from blt_runtime.bundle.engines import is_engines

    if is_engines(path):
        return {}

    if inputs.is_bundle(path) and opened.manifest is not None:
        from blt_runtime import Bundle

        read = weight_bytes.bundle_weight_bytes(Bundle(path, opened.manifest), patch_size=1)
    else:
        from blt.checkpoint.formats import open_source

        read = weight_bytes.source_weight_bytes(open_source(path, entropy_model=entropy_model), patch_size=1)
    return {PARTS_OF.get(part, part): n for part, n in read.items() if part != "total"}


def setting(opened: Model, path: Path, kind: str) -> dict[str, Any]:
    """What was measured, and where: the first keys of every `blt.bench/1`."""
    from blt.bench.machine import cpu_name

    return {
        "kind": kind,
        "model": path,
        "backend": opened.backend.name,
        "precision": precision_text(opened.manifest) if opened.manifest else "fp32",
        "cpu": cpu_name() or None,
        "patch_rule": {k: v for k, v in opened.spec.patch_rule.to_dict().items() if v not in (None, False)},
    }


def _captured(opened: Model) -> list[str] | None:
    """The graphs whose decode steps are captured: the host requests all kernels of a call at once. None where the
    backend does not say."""
    counts = {name: getattr(opened.backend.session(name), "captured", None) for name in opened.spec.graphs}
    return None if None in counts.values() else [name for name, count in counts.items() if count]


def latency_report(found: Latency) -> dict[str, Any]:
    """The numbers of `blt.bench/1`, in seconds and bytes."""
    mean = found.mean_patch if found.runs[0].closed else None
    parts, speculation = found.split, found.runs[0].speculation
    return {
        "threads": found.threads,
        "new_bytes": 1 + len(found.runs[0].gaps_s),
        "prompt_bytes": found.prompt_bytes,
        "repeat": len(found.runs),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "bytes_per_s": found.bytes_per_s,
        "bytes_per_s_of_runs": [run.bytes_per_s for run in found.runs],
        "time_to_first_byte_s": found.first_byte_s,
        "gap_p50_s": found.gap_s(50),
        "gap_p95_s": found.gap_s(95),
        "prefill_bytes_per_s": found.prompt_bytes / found.prefill_s,
        "mean_patch_bytes": mean,
        "weight_bytes_per_byte": {**found.weights, "total": sum(found.weights.values())} if found.weights else None,
        "read_bandwidth": vars(found.bandwidth) if found.bandwidth else None,
        "floor_bytes_per_s": found.floor_bytes_per_s,
        "share_of_floor": found.share_of_floor,
        "peak_bytes": found.peak_bytes,
        "resident_hash_table_bytes": found.tables_bytes,
        "seconds_per_byte": {**parts.seconds, "total": parts.total_s},
        "host_s_per_byte": parts.host_s,
        "requests_per_byte": found.requests_per_byte(),
        "latent_call_s": parts.latent_call_s,
        "calls_per_byte": {part: parts.per_byte(part) for part in parts.seconds if part != "other"},
        "speculation": _counts(speculation) if speculation.passes else None,
    }


# --- for people --------------------------------------------------------------------------------------------


def _size(n: float | None) -> str:
    from blt.data.quantities import amount

    return "unknown" if n is None else amount(n)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _counts(stats: SpeculationStats) -> dict[str, int]:
    """With the former names of two counts, for readers of the schema's first version."""
    return vars(stats) | {"guesses": stats.drafts, "right": stats.accepted}


def _place(report: dict[str, Any]) -> str:
    """Where the model ran: the threads, and the provider unless it is the CPU's."""
    provider = report["provider"] if report["provider"] not in (None, "cpu") else None
    return f"{f'{provider}, ' if provider else ''}{_count(report['threads'], 'thread')}"


def _bandwidth(found: Latency) -> str:
    best = found.bandwidth
    if best is None:
        return "unknown: the memory of this device cannot be measured"
    return f"{best.bytes_per_s / 1e9:.1f} GB/s (best sweep of {_size(best.buffer_bytes)} by {best.method})"


def _host(report: dict[str, Any]) -> str:
    share = report["host_s_per_byte"] / report["seconds_per_byte"]["total"]
    graphs = report["captured_graphs"]
    captured = "" if graphs is None else f", graphs that are captured: {', '.join(graphs) or 'none'}"
    return f"{share:.1%} of the time of a byte{captured}"


def _requests(found: Mapping[str, float | None]) -> str:
    """`1.22 launches, 2.44 copies and 1.22 waits per byte`"""
    each = [f"unknown {name}" if count is None else f"{count:,.2f} {name}" for name, count in found.items()]
    return f"{', '.join(each[:-1])} and {each[-1]} per byte"


def _speculation(stats: SpeculationStats) -> str:
    return f"{stats.tokens_per_pass:.2f} bytes per decoder pass, {stats.accepted:,} of {stats.drafts:,} drafts accepted"


def _floor(found: Latency) -> str:
    share = found.share_of_floor
    return "unknown" if share is None else f"{found.floor_bytes_per_s:,.1f} bytes/s, reached {share:.1%}"


def _show(report: dict[str, Any], found: Latency) -> None:
    from blt.figures.costs import duration

    mean = report["mean_patch_bytes"]
    patch = "unknown, no patch is complete" if mean is None else f"{mean:.2f} bytes"
    console.print_tree(
        {
            "model": f"{report['model']}, {report['precision']} on {report['backend']}, {_place(report)}",
            "text": f"{report['prompt_bytes']:,} bytes of prompt, {report['new_bytes']:,} new bytes, "
            f"{_count(report['repeat'], 'run')}, mean patch {patch}",
            "speed": f"{found.bytes_per_s:,.1f} bytes/s after the first byte",
            "gap between bytes": f"p50 {duration(found.gap_s(50))}, p95 {duration(found.gap_s(95))}",
            "time to first byte": f"{duration(found.first_byte_s)}, "
            f"prompt at {report['prefill_bytes_per_s']:,.0f} bytes/s",
            "weights read": f"{_size(sum(found.weights.values()) or None)} per byte",
            "read bandwidth": _bandwidth(found),
            **({} if found.in_caches else {"floor": _floor(found)}),
            **({"host": _host(report)} if found.on_device else {}),
            **({"requests": _requests(report["requests_per_byte"])} if report["requests_per_byte"] else {}),
            **({"speculation": _speculation(found.runs[0].speculation)} if report["speculation"] else {}),
            "opening": f"{report['open_s']:.2f} s",
            "peak memory": f"{_size(found.peak_bytes)}, hash tables {_size(found.tables_bytes)} of it",
            "load average": report["load_average"],
        }
    )
    print()
    console.stdout_console().print(split_table(found))


def split_table(found: Latency) -> Table:
    """The time of a byte by part, and how fast each part reads its weights."""
    parts, title = found.split, "where the time of a byte goes (a separate run with every call timed)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("part", "µs/byte", "share", "µs/call", "calls", "MB/byte", "GB/s", "of bandwidth"):
        table.add_column(name, justify="left" if name == "part" else "right")
    read = found.weights
    for part, seconds in parts.seconds.items():
        calls, n = parts.calls.get(part, 0), read.get(part)
        rate = n / seconds if n and seconds > 0 else None
        table.add_row(
            part,
            f"{1e6 * seconds:,.1f}",
            f"{seconds / parts.total_s:.1%}",
            f"{1e6 * seconds * parts.n / calls:,.1f}" if calls else "",
            f"{calls:,}" if calls else "",
            "" if n is None else f"{n / 1e6:,.3f}",
            "" if rate is None else f"{rate / 1e9:.1f}",
            ""
            if rate is None or found.in_caches or found.bandwidth is None
            else f"{rate / found.bandwidth.bytes_per_s:.0%}",
        )
    table.add_row(
        "total", f"{1e6 * parts.total_s:,.1f}", "", "", "", f"{sum(read.values()) / 1e6:,.3f}" if read else ""
    )
    return table


def _plot(found: Latency, title: str, path: Path) -> None:
    from blt.figures.costs import Bar, Bars, render

    bars = [Bar("measured", found.split.seconds)]
    floor = found.floor_s()
    if floor and not found.in_caches:
        bars.append(Bar("reading the weights", {part: floor[part] for part in found.split.seconds if part in floor}))
    figures.write(path, Bars(bars, title), render)
