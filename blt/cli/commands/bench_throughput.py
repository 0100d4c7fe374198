"""`blt bench throughput`: how fast a bundle generates for a batch of streams."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from blt.cli import console, models, options
from blt.cli.commands.bench import Lengths, PatchSize, Repeat, TextFile, read_text, setting

if TYPE_CHECKING:
    from blt.bench import BatchRun, PrefillGaps, Run, Text
    from blt_runtime import Model


@options.verbosity
@options.takes(options.ModelOptions, "precision", *options.BATCHED, "threads")
def throughput(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="BUNDLE",
            callback=options.model_or_bundle,
            help="A bundle, whose batched graphs need ONNX Runtime 1.32, or engines with batched streams.",
        ),
    ],
    batch: Annotated[
        str, typer.Option("--batch", metavar="N,N", help="Numbers of streams in a batch; each is measured.")
    ] = "1,8",
    prompt_bytes: Annotated[
        str | None,
        typer.Option("--prompt-bytes", metavar="SIZE", help="Bytes of a prompt (default: 64, or what fits)."),
    ] = None,
    new_bytes: Annotated[
        str | None,
        typer.Option(
            "--new-bytes", metavar="SIZE", help="Bytes that each stream generates (default: 128, or what fits)."
        ),
    ] = None,
    repeat: Repeat = 3,
    patch_size: PatchSize = None,
    temperature: options.Temperature = 0.8,
    share: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Run the latent transformer when this share of the streams waits for it."),
    ] = 0.5,
    slice: Annotated[
        int, typer.Option(min=1, help="Bytes of a prompt that one call reads while other streams generate.")
    ] = 8,
    text: TextFile = None,
    *,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Measure a batch of streams: bytes per second in total and relative to one stream, and gaps between bytes."""
    from blt import bench

    sizes = [options.parse_size(size, "--batch", at_least=1) for size in batch.split(",")]
    wanted = Lengths.of(prompt_bytes, new_bytes, usual=(64, 128), least_new=16)
    shift = bench.SHIFT * max(sizes)
    data = read_text(text, shift + wanted.total)
    models.check_batched(model, how, max(sizes))
    with models.open_model(model, how) as single:
        single = bench.with_changes(single, spec=models.batched_spec(model, single.spec))
        prompt_n, new_n = wanted.fitting(min(single.spec.capacity_bytes - 1, len(data) - shift))
        given = bench.shifted_texts(data, streams=max(sizes), prompt_bytes=prompt_n, new_bytes=new_n)
        given[0].check_room(single.spec.capacity_bytes)
        if patch_size is not None:
            single = bench.at_patch_size(single, given, patch_size, by_rises=True)
        spec = single.spec
        alone = [_alone(single, given[i % len(given)], temperature) for i in range(1 + repeat)]
    del single  # two copies of a large model do not fit into memory
    opened = bench.with_changes(models.open_batched(model, how), spec=spec)
    rows = []
    for streams in sizes:
        texts = given[:streams]
        with_prompt = repeat if streams > 1 else 0
        runs = [
            bench.batch_run(opened, texts, temperature=temperature, share=share, slice=slice) for _ in range(repeat)
        ]
        prefills = [
            bench.prefill_gaps(opened, texts, temperature=temperature, share=share, slice=slice)
            for _ in range(with_prompt)
        ]
        rows.append(_row(runs, prefills))
    report = {
        **setting(opened, model, "throughput"),
        "provider": getattr(opened.backend, "provider", None),
        "threads": how.threads,
        "prompt_bytes": prompt_n,
        "new_bytes": new_n,
        "repeat": repeat,
        "share": share,
        "slice": slice,
        "one_stream_bytes_per_s": statistics.median(run.bytes_per_s for run in alone[1:]),
        "one_stream_mean_patch_bytes": statistics.median(run.mean_patch for run in alone[1:]),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "streams": rows,
    }
    if as_json:
        console.print_json("blt.bench/1", report)
        return
    _show(report)


def _alone(model: Model, text: Text, temperature: float) -> Run:
    from blt import bench

    return bench.run(model.stream(), text, bench.Forced(text.new.tolist(), temperature))


def _row(runs: list[BatchRun], prefills: list[PrefillGaps]) -> dict[str, Any]:
    """Medians over the runs of one batch size. `prefills`: runs with one more prompt; none for a single stream."""

    def median(of: Callable[[BatchRun], float]) -> float:
        return statistics.median(of(run) for run in runs)

    return {
        "streams": runs[0].streams,
        "bytes_per_s": median(lambda run: run.bytes_per_s),
        "bytes_per_s_of_runs": [run.bytes_per_s for run in runs],
        "time_to_first_byte_s": median(lambda run: run.first_byte_s),
        "gap_p50_s": median(lambda run: run.gap_s(50)),
        "gap_p95_s": median(lambda run: run.gap_s(95)),
        "patches_per_latent_call": median(lambda run: run.patches_per_call),
        "mean_patch_bytes": median(lambda run: run.mean_patch),
        "gap_p95_while_a_prompt_is_read": statistics.median(p.p95_ratio for p in prefills) if prefills else None,
        "time_to_first_byte_of_the_prompt_s": statistics.median(p.first_byte_s for p in prefills) if prefills else None,
    }


def _show(report: dict[str, Any]) -> None:
    one = report["one_stream_bytes_per_s"]
    title = (
        f"{report['model']}, {report['precision']}: one stream alone {one:,.1f} bytes/s, "
        f"{report['one_stream_mean_patch_bytes']:.2f} bytes per patch; prompts of {report['prompt_bytes']:,} bytes, "
        f"{report['new_bytes']:,} new bytes, load average {report['load_average']}"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    columns = ("streams", "bytes/s", "x one", "gap p50", "gap p95", "first byte", "patches/call", "bytes/patch")
    for name in (*columns, "p95 with prompt"):
        table.add_column(name, justify="right")
    for row in report["streams"]:
        with_prompt = row["gap_p95_while_a_prompt_is_read"]
        table.add_row(
            f"{row['streams']}",
            f"{row['bytes_per_s']:,.1f}",
            f"{row['bytes_per_s'] / one:.2f}",
            f"{1e3 * row['gap_p50_s']:,.1f} ms",
            f"{1e3 * row['gap_p95_s']:,.1f} ms",
            f"{row['time_to_first_byte_s']:.2f} s",
            f"{row['patches_per_latent_call']:.1f}",
            f"{row['mean_patch_bytes']:.2f}",
            "" if with_prompt is None else f"x {with_prompt:.2f}",
        )
    console.stdout_console().print(table)
