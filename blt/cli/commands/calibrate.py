"""`blt calibrate`: the threshold that gives a wanted mean patch size, and what other thresholds would cost.

Not here: the search (`blt.data.threshold`), the measurements (`blt.evaluate.costs`), the output (`calibrate_table`,
`blt.figures.tradeoff`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from blt import files
from blt.cli import console, devices, figures, inputs, models, options
from blt.cli.commands import calibrate_table as tradeoff
from blt.evaluate import costs, texts
from blt_runtime.errors import CheckFailed, CheckpointError, UsageError
from blt_runtime.patching import PatchRule

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blt.checkpoint.models import Checkpoint
    from blt.data.threshold import Piece
    from blt.model import EntropyModel

    Halves = tuple[list[Piece], list[Piece]]  # to choose the threshold on, held out

SPLITS = ("valid", "test", "train")
"""In the order in which one with text is searched."""
MEANS = (2.0, 3.0, 4.0, 4.5, 6.0, 8.0)  # bytes per patch; rows of the table besides the wanted one


@options.verbosity
@options.takes(options.ModelOptions, "backend", "entropy_model", "provider", "engine_cache", "threads")
def calibrate(
    model: options.CheckpointPath,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A data folder (blt data prepare) or a file.")],
    mean_patch: Annotated[
        float, typer.Option("--mean-patch", metavar="BYTES", help="Wanted mean patch size in bytes.")
    ],
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule",
            metavar="global|monotonic",
            help="Threshold on the entropy or on its rise (default: the model's).",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="MODEL", help="Write the model with the new threshold.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="OUT", help="Draw the table, as .png or .html.")] = None,
    split: Annotated[
        str | None, typer.Option(help="train, valid or test of a data folder (default: valid, else test, else train).")
    ] = None,
    n_bytes: Annotated[
        str, typer.Option("--bytes", metavar="SIZE", help="Read about this much text, spread evenly over DATA.")
    ] = "4M",
    bpb_bytes: Annotated[
        str,
        typer.Option("--bpb-bytes", metavar="SIZE", help="Score about this much held-out text per threshold; 0: none."),
    ] = "32k",
    context: Annotated[
        str, typer.Option(metavar="SIZE", help="Longest piece in bytes; longer documents are cut.")
    ] = "4k",
    tolerance: Annotated[
        float, typer.Option(help="Fail (exit code 3) if held-out text misses the mean by a larger share.")
    ] = 0.02,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that -o names.")] = False,
    device: Annotated[
        str,
        typer.Option("--device", help="Device of the entropy model: cpu, cuda[:n], or auto (a GPU if there is one)."),
    ] = "auto",
    *,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Find the threshold that gives a wanted mean patch size, and its cost in bits per byte and speed."""
    _check_numbers(mean_patch, tolerance)
    inputs.refuse_engines(model, "calibrate the checkpoint they come from, then export and build again")
    if inputs.is_bundle(model):
        raise UsageError(f"{model} is a bundle; calibrate the checkpoint it was exported from, then export again")
    models.check_for_checkpoint(model, how)
    figures.check_path(plot)
    _check_out(out, force)
    size = options.parse_size(context, "--context", at_least=1)
    most = options.parse_size(n_bytes, "--bytes", at_least=1)
    scored = options.parse_size(bpb_bytes, "--bpb-bytes")
    from blt.checkpoint import native
    from blt.checkpoint.formats import open_source
    from blt.checkpoint.models import build
    from blt.data.threshold import base_rule, halves, sizes

    devices.limit_torch_threads(how.threads)
    source = open_source(model, how.entropy_model)
    if source.bpe is not None:
        source.check_can_generate()
    if source.entropy_config is None:
        raise CheckpointError(f"{model} has no entropy model; name one with --entropy-model PATH")
    base, place = base_rule(source.patch_rule, rule), devices.torch_device(device)
    size = min(size, source.entropy_config.max_seqlen - 2)
    text = texts.spread(data, texts.choose_split(data, split, SPLITS), context=size, most=most)
    mapped = place == "cpu"  # hash tables that stay in their file
    checkpoint = build(source, trainable=not mapped).with_entropy_dtype(base.entropy_dtype)
    parts = halves(_pieces(_present(checkpoint.entropy), text, reset_newlines=base.reset_newlines, device=place))
    rows, unreachable = _rows(parts, own=source.patch_rule, base=base, wanted=mean_patch)
    rule_found, cost = rows[0].rule, None
    if checkpoint.blt is not None:
        timed = replace(checkpoint, patch_rule=costs.clocked(base))
        rows, cost = _with_costs(rows, timed, parts[1], scored_bytes=scored, how=how)
    chosen_on, held_out = sizes(rule_found, parts[0]), rows[0].sizes
    result = tradeoff.Result(
        wanted=mean_patch,
        tolerance=tolerance,
        rule=rule_found,
        chosen_on=chosen_on,
        held_out=held_out,
        rows=rows,
        unreachable=unreachable,
        cost=cost,
    )
    if plot is not None:
        _plot(result, plot)
    written = out if result.problem is None else None
    if written is not None:
        native.write(replace(source, patch_rule=result.rule), written)
    if as_json:
        console.print_json("blt.calibrate/1", tradeoff.report(result, written))
    else:
        console.stdout_console().print(tradeoff.table(result))
        console.say("\n".join(tradeoff.notes(result, written)))
    if result.problem:
        raise CheckFailed(result.problem + (f"; {out} was not written" if out else ""))


def _check_numbers(mean: float, tolerance: float) -> None:
    if not (math.isfinite(mean) and mean >= 1):
        raise UsageError(f"--mean-patch {mean:g}: a patch has at least 1 byte")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise UsageError(f"--tolerance {tolerance:g}: give a share such as 0.02")


def _check_out(out: Path | None, force: bool) -> None:
    if out is None:
        return
    if out.is_dir():
        raise UsageError(f"-o {out} is a folder; name the file to write, such as {out / 'model.pt'}")
    files.check_folder(out)
    if out.exists() and not force:
        raise UsageError(f"{out} exists; --force replaces it")


def _present(model: EntropyModel | None) -> EntropyModel:
    assert model is not None  # its source has a configuration
    return model


def _pieces(
    model: EntropyModel, rows: Sequence[NDArray[np.int64]], *, reset_newlines: bool, device: str
) -> list[Piece]:
    """Pieces of the text with their entropies, one uncached forward pass per row."""
    import torch

    from blt.data.threshold import Piece
    from blt.model import entropy_of

    model.to(device)

    @torch.inference_mode()
    def entropies(ids_N: NDArray[np.int64]) -> NDArray[np.float32]:
        logits_BNV = model(torch.from_numpy(ids_N)[None].to(device), reset_newlines)
        found_N: NDArray[np.float32] = entropy_of(logits_BNV)[0].cpu().numpy()
        return found_N

    with console.progress("entropies", sum(map(len, rows))) as advance:
        pieces = []
        for ids_N in rows:
            pieces.append(Piece(ids_N, entropies(ids_N)))
            advance(len(ids_N))
    model.to("cpu")
    return pieces


def _rows(
    halves: Halves, *, own: PatchRule | None, base: PatchRule, wanted: float
) -> tuple[list[tradeoff.Row], list[float]]:
    """Rows without costs: the wanted mean, the model's own rule, then `MEANS`. And those of `MEANS` that no threshold
    reaches."""
    from blt.data.threshold import find_rule, sizes

    chosen_on, held_out = halves
    found = find_rule(base, chosen_on, wanted)
    rows, unreachable = [tradeoff.Row(wanted, found, sizes(found, held_out))], []
    if own is not None:
        rows.append(tradeoff.Row(None, own, sizes(own, held_out)))
    for mean in MEANS:
        try:
            rule = find_rule(base, chosen_on, mean)
        except UsageError:
            unreachable.append(mean)
            continue
        if mean != wanted:
            rows.append(tradeoff.Row(mean, rule, sizes(rule, held_out)))
    return rows, unreachable


def _with_costs(
    rows: list[tradeoff.Row],
    checkpoint: Checkpoint,
    held_out: Sequence[Piece],
    *,
    scored_bytes: int,
    how: options.ModelOptions,
) -> tuple[list[tradeoff.Row], tradeoff.Cost]:
    """Rows with bits per byte (on about `scored_bytes`) and expected speed, and how those were measured.

    `checkpoint` has the patch rule of the timing (`costs.clocked`); scoring brings its own patches.
    """
    sample = _sample(held_out, scored_bytes)
    longest = max(held_out, key=lambda piece: len(piece.ids)).ids
    with (
        models.open_checkpoint(checkpoint, how, capacity=len(longest)) as model,
        console.progress("bits per byte", len(rows)) as advance,
    ):
        times = costs.measure_times(model, longest)
        found = []
        for row in rows:
            bits = costs.bits_per_byte(model, row.rule, sample) if sample else None
            speed = times.bytes_per_s(row.sizes.mean) if times else None
            found.append(replace(row, bits_per_byte=bits, bytes_per_s=speed))
            advance()
    backend = "onnx" if how.backend == "onnx" else "torch"
    return found, tradeoff.Cost(sum(piece.n_bytes for piece in sample), times, backend)


def _sample(pieces: Sequence[Piece], most: int) -> list[Piece]:
    """Pieces of about `most` bytes in total, spread evenly."""
    if not most:
        return []
    return list(pieces[:: math.ceil(sum(piece.n_bytes for piece in pieces) / most)])


def _plot(result: tradeoff.Result, path: Path) -> None:
    from blt.figures.tradeoff import Point, Tradeoff, render

    rule, mean = result.rule, result.held_out.mean
    points = []
    for row in result.sorted_rows():
        comparable = tradeoff.form(row.rule) == tradeoff.form(rule)  # entropies and their rises share no axis
        threshold = row.rule.threshold if comparable else None
        mark = tradeoff.mark(row, result)
        points.append(
            Point(
                mean=row.sizes.mean,
                threshold=threshold,
                bits_per_byte=row.bits_per_byte,
                bytes_per_s=row.bytes_per_s,
                mark=mark,
            )
        )
    title = f"{tradeoff.form(rule)} rule: threshold {rule.threshold} gives {mean:.2f} bytes per patch"
    figures.write(path, Tradeoff(points, title), render)
