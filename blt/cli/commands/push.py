"""`blt push`: a checkpoint, a bundle or both to the Hugging Face hub, with a model card and a tokenizer of bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from blt.cli import console, inputs, options
from blt_runtime.errors import UsageError

SCHEMA = "blt.push/1"
RepositoryName = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub.")]


@options.verbosity
@options.takes(options.ModelOptions, "entropy_model")
def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            callback=options.existing_model,
            help="A run folder, model.pt, a folder in the facebook or Hugging Face format, or a bundle.",
        ),
    ],
    name: RepositoryName,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", metavar="DIR", help="Also upload this bundle of FOLDER (default: none).")
    ] = None,
    license: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Licence for the card, such as apache-2.0 (default: none)."),
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(
            "--bench", metavar="FILE", help="Output of blt bench latency --json for the card (default: none)."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Data folder for the card (default: that of the run's config)."),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option("--card", metavar="FILE", help="Model card (default: FOLDER/README.md, else one is written)."),
    ] = None,
    message: Annotated[str, typer.Option("--message", help="Message of the commit.")] = "Upload with blt push",
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, made if it is missing (default: main).")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files and print the card; use no network.")
    ] = False,
    *,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Upload FOLDER to the hub in one commit: weights as safetensors where possible, a bundle under onnx/, a card."""
    from blt.share import upload
    from blt.share.card import FILE, check_license
    from blt.share.contents import CardOptions, gather

    upload.check_name(name)
    if not message.strip():
        raise UsageError("--message is empty; write what changed")
    if not folder.exists():
        raise UsageError(f"{folder} is a name on the hub; give a folder of this machine (blt pull downloads one)")
    for given in (folder, *([] if bundle is None else [bundle])):
        inputs.refuse_engines(given, "they run on one kind of GPU; upload the bundle that they were built from")
    licence = None if license is None else check_license(license)
    if not dry_run:
        upload.check_token()
    described = CardOptions(license=licence, file=card, bench=bench, data=data)
    with tempfile.TemporaryDirectory(prefix="blt-push-") as scratch:
        items = gather(folder, name, Path(scratch), bundle=bundle, entropy_model=how.entropy_model, options=described)
        files = [{"path": item.name, "bytes": item.bytes} for item in items]
        text = next(item.source for item in items if item.name == FILE)
        if not as_json:
            _show(files)
        address = None
        if not dry_run:
            address = upload.upload(name, items, message=message, private=private, revision=revision)
    shown = text.decode() if isinstance(text, bytes) else ""
    if as_json:
        console.print_json(SCHEMA, {"repository": name, "files": files, "card": shown, "commit": address})
    else:
        console.say(f"\n{shown}" if address is None else address)


def _show(files: list[dict[str, Any]]) -> None:
    """The names and sizes of the files, then their sum."""
    from blt.data.quantities import amount

    table = Table(box=None, pad_edge=False)
    table.add_column("file")
    table.add_column("size", justify="right")
    for file in files:
        table.add_row(file["path"], amount(file["bytes"]))
    table.add_row(f"{len(files)} files", amount(sum(file["bytes"] for file in files)))
    console.stdout_console().print(table)
