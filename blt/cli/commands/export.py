"""`blt export`: writes a checkpoint as a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from blt.cli import console, inputs, options
from blt.cli.bundle_tables import evaluation_table, parity_table, precision_text, size_table
from blt.evaluate import texts
from blt_runtime.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from blt.checkpoint.models import Checkpoint
    from blt_export import ExportReport
    from blt_export.aot import Attempt

FLAVOURS = ("ort", "cuda", "portable")
EVAL_BYTES = 1 << 18
"""Bytes of --eval-data that are evaluated, in pieces spread over it. With the demo model, PyTorch and the bundle take
half a minute each."""
EVAL_PIECE = 4096


@options.verbosity
@options.takes(options.ModelOptions, "entropy_model")
def export(
    context: typer.Context,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            callback=options.existing_model,
            help="A checkpoint: model.pt, a run folder, a folder in the facebook or Hugging Face format, or a hub "
            "name. With --triton also a bundle.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Folder to write the bundle to.")
    ] = None,
    flavour: Annotated[
        str, typer.Option(help="ort (fastest on CPUs), cuda (GPUs: CUDA and WebGPU) or portable (standard operators).")
    ] = "ort",
    precision: Annotated[
        str,
        typer.Option(
            help="fp32; fp16, or bf16 for GPUs; or int8 or int4, of the weight matrices only: the rest is then fp32 in "
            "ort, fp16 in cuda and portable."
        ),
    ] = "fp32",
    precision_of: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GRAPH=PRECISION",
            help="Precision of one graph: entropy, encoder, latent or decoder; repeatable (default: --precision).",
        ),
    ] = None,
    eval_data: Annotated[
        Path | None,
        typer.Option(
            metavar="TEXT",
            help="File or data folder: report bits per byte of float32 and of the bundle, on 256 KiB of it.",
        ),
    ] = None,
    table_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE", help="Hash tables as float32, float16, bfloat16 or int8 (default: as in the checkpoint)."
        ),
    ] = None,
    capacity: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes that a stream can hold (default: the trained length).")
    ] = None,
    patches: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Patches that a stream can hold (default: the trained length, or --capacity)."
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Jinja template of chats, stored for `blt serve` (default: none)."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare the graphs with PyTorch, and fail beyond the tolerance.")
    ] = True,
    check_aot: Annotated[
        bool,
        typer.Option(
            "--check-aot", help="Also compile the graphs with TensorRT-RTX (needs --flavour portable; extra aot)."
        ),
    ] = False,
    triton: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Also write the bundle as a model of this repository of NVIDIA Triton Inference Server."
        ),
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy/--no-copy", help="Copy the bundle into --triton's DIR, or refer to it by its path.")
    ] = True,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name in Triton (default: the bundle folder's).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle, and a model in Triton.")] = False,
    *,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Write MODEL as a bundle: ONNX graphs with all that the runtime needs, compared with PyTorch.

    With --triton, the bundle also becomes a model for NVIDIA Triton Inference Server; MODEL may be a bundle then.
    """
    if flavour not in FLAVOURS:
        raise UsageError(f"--flavour {flavour}: choose one of {', '.join(FLAVOURS)}")
    overrides = _overrides(precision_of or [])
    size = None if capacity is None else options.parse_size(capacity, "--capacity", at_least=2)
    most_patches = None if patches is None else options.parse_size(patches, "--patches", at_least=2)
    for_triton = None if triton is None else _Triton(triton, served_model_name, copy, force)
    inputs.refuse_engines(model, "give the checkpoint, or with --triton the bundle, that they were built from")
    if inputs.is_bundle(model):
        if for_triton is None:
            raise UsageError(f"{model} is a bundle already; give the checkpoint it was exported from, or --triton DIR")
        _refuse_options_of_the_export(context, model)
        _add_to_triton(for_triton, model, as_json)
        return
    if out is None:
        raise UsageError("-o DIR is missing: the folder to write the bundle to")
    if for_triton is None and (served_model_name is not None or not copy):
        raise UsageError("--served-model-name and --no-copy have no effect without --triton DIR")
    import onnx  # noqa: F401  first: where PyTorch is missing too, the extra to install is `export`

    import blt_export.aot
    import blt_export.bundle
    import blt_export.pipeline
    from blt.checkpoint.models import load
    from blt_runtime.chat_template import ChatTemplate

    blt_export.pipeline.check_arguments(flavour, precision, table_dtype=table_dtype, precision_of=overrides)
    if check_aot:
        blt_export.aot.check_arguments(flavour)
    blt_export.bundle.check_target(out, force)  # before minutes of work
    if for_triton is not None:
        for_triton.check(out)
    template = None if chat_template is None else inputs.text_file(chat_template, "--chat-template")
    if template is not None:
        ChatTemplate(template)  # raises if it is none
    loaded = load(model, entropy_model=how.entropy_model, generates=True)
    eval_ids = () if eval_data is None else _eval_ids(eval_data, loaded, size)
    with console.named_steps("export", len(blt_export.pipeline.STEPS)) as begin:
        report = blt_export.export(
            loaded,
            out,
            flavour=flavour,
            precision=precision,
            capacity=size,
            patches=most_patches,
            check=check,
            force=force,
            table_dtype=table_dtype,
            precision_of=overrides,
            eval_ids=eval_ids,
            chat_template=template,
            progress=begin,
        )
    compiled = blt_export.aot.compile_bundle(out, report.manifest) if check_aot else ()
    served = None if for_triton is None else for_triton.write(out)
    if as_json:
        gate = {"aot": [asdict(attempt) for attempt in compiled]} if check_aot else {}
        also = {} if served is None else {"triton": served}
        payload = {"bundle": out, "seconds": round(report.seconds, 2), **report.to_json(), **gate, **also}
        console.print_json("blt.export/2", payload)
        _demand_compiled(compiled)
        return
    if report.parity:
        console.stdout_console().print(parity_table(report.parity))
        if report.manifest.precisions.get("entropy") in ("fp16", "bf16"):
            print(_near_threshold(report))
        print()
    if report.manifest.judged is not None:
        console.stdout_console().print(evaluation_table(report.manifest.judged))
        print()
    if compiled:
        console.stdout_console().print(_compile_table(compiled))
        print()
    console.stdout_console().print(size_table(report.manifest))
    console.say(f"\n{out}: {flavour}, {precision_text(report.manifest)}, written in {report.seconds:.1f} s")
    if served is not None:
        console.say(f"{served}: a model of Triton's Python backend")
    _demand_compiled(compiled)


@dataclass(frozen=True)
class _Triton:
    """What the options say about the model repository."""

    repository: Path
    name: str | None
    copy: bool
    force: bool

    def _name(self, bundle: Path) -> str:
        from blt.checkpoint import hub

        return self.name or hub.model_name(bundle).rsplit("/")[-1]

    def check(self, bundle: Path) -> None:
        """Raises UsageError if the model cannot be written for the bundle that will be in this folder."""
        from blt.triton import repository

        repository.check_target(self.repository, self._name(bundle), self.force)

    def write(self, bundle: Path) -> Path:
        from blt.triton import repository

        return repository.write(bundle, self.repository, self._name(bundle), copy=self.copy, force=self.force)


def _add_to_triton(for_triton: _Triton, bundle: Path, as_json: bool) -> None:
    served = for_triton.write(bundle)
    if as_json:
        console.print_json("blt.export/2", {"bundle": bundle, "triton": served})
    else:
        console.say(f"{served}: a model of Triton's Python backend")


FOR_BUNDLES = ("model", "triton", "copy", "served_model_name", "force", "as_json", "quiet", "verbose")


def _refuse_options_of_the_export(context: typer.Context, model: Path) -> None:
    """Raises UsageError for an option that has no effect on a bundle."""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name not in FOR_BUNDLES and source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"{option.opts[-1]} has no effect: {model} is a bundle already")


def _near_threshold(report: ExportReport) -> str:
    """At half precision: where patch boundaries may differ from those of float32."""
    near = report.near_json()
    assert near is not None
    return (
        f"{near['entropies']:,} of {near['of']:,} entropies are within {near['margin']:.1e}, twice the largest "
        "error, of the threshold: patch boundaries may move there"
    )


def _compile_table(attempts: Sequence[Attempt]) -> Table:
    table = Table(title="TensorRT-RTX", title_justify="left", box=None, pad_edge=False)
    for name in ("graph", "accepted", "seconds"):
        table.add_column(name, justify="right" if name == "seconds" else "left")
    for attempt in attempts:
        table.add_row(attempt.graph, "no" if attempt.refused else "yes", f"{attempt.seconds:.1f}")
    return table


def _demand_compiled(attempts: Sequence[Attempt]) -> None:
    refused = [attempt.refused for attempt in attempts if attempt.refused]
    if refused:
        raise CheckFailed("; ".join(refused) + " (the bundle was written)")


def _overrides(pairs: list[str]) -> dict[str, str]:
    """`["entropy=fp32"]` as a dictionary; the export checks the names."""
    found: dict[str, str] = {}
    for pair in pairs:
        graph, equals, precision = pair.partition("=")
        if not (graph and equals and precision):
            raise UsageError(f"--precision-of {pair}: write GRAPH=PRECISION, for example entropy=fp32")
        if graph in found:
            raise UsageError(f"--precision-of names {graph} twice")
        found[graph] = precision
    return found


def _eval_ids(data: Path, checkpoint: Checkpoint, capacity: int | None) -> list[NDArray[np.int64]]:
    """Pieces of the test split, or of the file, that fit into a stream with BOS and EOS."""
    from blt.model.graphs import Limits

    context = min(EVAL_PIECE, Limits.of(checkpoint.require_blt()[0].config, capacity).bytes - 2)
    if context < 1:
        raise UsageError("--eval-data needs a --capacity of at least 3")
    return texts.spread(data, texts.choose_split(data, None), context=context, most=EVAL_BYTES)
