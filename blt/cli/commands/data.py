"""`blt data`: makes a data folder from text, and shows the contents of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from blt.cli import console, options
from blt_runtime.errors import UsageError

MOST_GROUPS = 20  # of a split, in the table

app = typer.Typer(no_args_is_help=True, help="Turn text into training data.")


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(float(part) for part in text.split("/"))
    except ValueError:
        shares = ()
    if len(shares) != 3:  # prepare checks the values
        raise UsageError(f"--split {text}: write the shares of train, valid and test, as in 98/1/1")
    return shares


@app.command("prepare")
@options.verbosity
def prepare(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="IN...", help="Files of text or records, and folders of them.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to write.")],
    format: Annotated[
        str,
        typer.Option(help="auto, txt (any content; a NUL byte ends a document), jsonl, parquet or dir (folders only)."),
    ] = "auto",
    text_field: Annotated[
        str, typer.Option(help="Key of the text in JSONL, or column in parquet; meta.text names a nested key.")
    ] = "text",
    prompt_field: Annotated[
        str | None, typer.Option(help="Key of the prompt, which has no loss (default: none).")
    ] = None,
    completion_field: Annotated[
        str | None, typer.Option(help="Key of the completion after the prompt (default: none).")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="SHARES",
            help="Shares of train/valid/test (default: 98/1/1). If given, files named train are split too.",
        ),
    ] = None,
    ignore_names: Annotated[
        bool, typer.Option("--ignore-names", help="Do not let names such as test.jsonl or valid/ decide the split.")
    ] = False,
    group_by: Annotated[
        str, typer.Option(help="Name groups after the file, the folder, or auto: the folder if there are many files.")
    ] = "auto",
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse null texts, invalid UTF-8 and entries that cannot be read.")
    ] = False,
    max_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Most memory for the window of a compressed file or a row of parquet.")
    ] = "256M",
    dedup: Annotated[bool, typer.Option("--dedup", help="Drop exact duplicates.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Files read in parallel, one thread each.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Seed of the split.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing data folder.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write text as a data folder: shards of bytes and a manifest (sha256, bytes, documents)."""
    from blt.data.dataset import info as describe
    from blt.data.prepare import prepare as run

    run(
        inputs, out, format=format, split=None if split is None else _shares(split), ignore_names=ignore_names,
        group_by=group_by, dedup=dedup, text_field=text_field, prompt_field=prompt_field,
        completion_field=completion_field, strict=strict,
        max_memory=options.parse_size(max_memory, "--max-memory", at_least=1 << 20), workers=workers, seed=seed,
        force=force,
    )  # fmt: skip
    _show(describe(out), as_json)


@app.command("corpus")
@options.verbosity
def corpus(
    name: Annotated[str, typer.Argument(help="tiny (the library of this Python) or base (Debian packages).")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to write.")],
    debs: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder with the Debian packages that base needs; without it, an error lists them."
        ),
    ] = None,
    groups: Annotated[
        str | None, typer.Option(metavar="GLOB,...", help="Only these groups, such as '*.en,code.*' (default: all).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing data folder.")] = False,
    as_json: options.Json = False,
) -> None:
    """Build a named corpus as a data folder. base is the same text on every machine."""
    from blt.data.corpora import build
    from blt.data.dataset import info as describe

    build(name, out, debs=debs, groups=groups.split(",") if groups else None, force=force)
    _show(describe(out), as_json)


@app.command("info")
@options.verbosity
def info(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A data folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every shard and compare its sha256.")] = False,
    groups: Annotated[bool, typer.Option("--groups", help="List all groups, even if there are many.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show the splits, groups, documents and bytes of a data folder."""
    from blt.data.dataset import info as describe

    _show(describe(folder, verify), as_json, groups)


def _show(report: dict[str, Any], as_json: bool, all_groups: bool = False) -> None:
    if as_json:
        console.print_json("blt.data/1", report)
        return
    table = Table(title=report["path"], title_justify="left", box=None, pad_edge=False)
    for name in ("split", "group", "documents", "bytes"):
        table.add_column(name, justify="left" if name in ("split", "group") else "right")
    for name, split in report["splits"].items():
        table.add_row(name, "", f"{split['documents']:,}", f"{split['bytes']:,}")
        groups = sorted(split.get("groups", {}).items())
        if len(groups) > MOST_GROUPS and not all_groups:
            table.add_row("", f"{len(groups)} groups (blt data info --groups lists them)", "", "")
            continue
        for group, part in groups:
            table.add_row("", group, f"{part['documents']:,}", f"{part['bytes']:,}")
    console.stdout_console().print(table)
