"""`blt pull`: a checkpoint, a bundle or both from the Hugging Face hub, with all checksums compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blt import files
from blt.cli import console, inputs, options
from blt.cli.commands.push import RepositoryName
from blt_runtime.errors import UsageError

SCHEMA = "blt.pull/1"


@options.verbosity
def pull(
    name: RepositoryName,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Folder to write (default: the hub's cache only)."),
    ] = None,
    bundle: Annotated[
        bool, typer.Option("--bundle", help="Only the bundle; DIR is the bundle then. Both options: both.")
    ] = False,
    checkpoint: Annotated[bool, typer.Option("--checkpoint", help="Only the checkpoint and the card.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit (default: main).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing model in DIR.")] = False,
    as_json: options.Json = False,
) -> None:
    """Download OWNER/NAME and print the folder. After an interruption, only missing files are downloaded."""
    from blt.data.quantities import amount
    from blt.share import download, upload

    upload.check_name(name)
    if out is not None:
        _check_target(out, force)
    both = bundle == checkpoint
    pulled = download.pull(name, checkpoint=checkpoint or both, bundle=bundle or both, revision=revision)
    place = pulled.folder
    if out is not None:
        with files.staged(out) as temporary:
            download.copy(pulled, temporary)
        place = out
    console.log.info("%s at %s: %d files, %s", name, pulled.commit[:12], len(pulled.files), amount(pulled.bytes))
    if as_json:
        report = {"repository": name, "commit": pulled.commit, "path": place, "files": pulled.files}
        console.print_json(SCHEMA, {**report, "bytes": pulled.bytes})
    else:
        console.say(str(place))


def _check_target(out: Path, force: bool) -> None:
    """Raises UsageError unless the folder may be written. --force replaces only a folder that holds a model."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"-o {out}: this is a file; give a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not force:
        raise UsageError(f"{out} exists; give another path, or --force to replace it")
    if not any((out / name).is_file() for name in (*inputs.MODEL_FILES, "onnx/manifest.json")):
        raise UsageError(f"{out} holds no model and is not replaced; give a new folder")
