"""`blt generate --jsonl IN -o OUT`: a prompt per line, generated in a batch. A killed run continues where it was."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from blt.cli import console, generation, models, options
from blt_runtime import reading
from blt_runtime.errors import BltError, InputError, UsageError
from blt_runtime.ids import to_bytes
from blt_runtime.options import GenerateOptions, resolve

if TYPE_CHECKING:
    from blt.generate.output import Output

log = logging.getLogger("blt.cli")
STREAMS = 16
NAMES = ("temperature", "top_k", "top_p", "min_p", "seed", "stop_at_eos")


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """What the prompts are, and where their texts go. Raises UsageError for an option without --jsonl."""

    jsonl: Annotated[
        str | None,
        typer.Option(
            "--jsonl", metavar="IN", help="Generate for each line of this file, in a batch (default: one PROMPT)."
        ),
    ] = None
    out: Annotated[
        str | None,
        typer.Option("-o", "--out", metavar="OUT", help="With --jsonl: write a JSON line per line here; - is stdout."),
    ] = None
    streams: Annotated[
        int | None, typer.Option("--streams", min=1, help=f"With --jsonl: lines at a time (default: {STREAMS}).")
    ] = None
    force: Annotated[bool, typer.Option("--force", help="With --jsonl: begin OUT anew instead of continuing it.")] = (
        False
    )

    def __post_init__(self) -> None:
        given = {"-o": self.out is not None, "--streams": self.streams is not None, "--force": self.force}
        if self.jsonl is None:
            for name in (name for name, there in given.items() if there):
                raise UsageError(f"{name} belongs to --jsonl IN; leave it out, or give --jsonl")
        elif self.out is None:
            raise UsageError("--jsonl needs -o OUT: a file, or - for standard output")
        elif self.jsonl == "-" and self.out != "-":
            raise UsageError(
                "--jsonl -: a run that reads standard input cannot be continued; write to -o -, or give a file"
            )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """chosen: options of every line, without the grammar."""

    model: Path
    files: BatchOptions
    n: int
    chosen: GenerateOptions
    constraint: options.GrammarOptions
    how: options.ModelOptions


def run(batch: Batch) -> None:
    """Writes a record for each line. Raises BltError (exit code 1) if some of them have an error."""
    from blt.generate import batch as batches
    from blt.generate.chat_format import format_of
    from blt.generate.prompts import Defaults, read_lines
    from blt_runtime import Scheduler

    streams = batch.files.streams or STREAMS
    models.check_batched(batch.model, batch.how, streams)
    chosen = resolve(batch.chosen, {"grammar": batch.constraint.compiled(), "seed": None})
    most = batches.window(streams)
    with (
        _opened(batch) as file,
        Scheduler(model := models.open_batched(batch.model, batch.how), streams=streams, waiting=most) as scheduler,
        _output(batch, file, getattr(model.backend, "provider", model.backend.name)) as out,
    ):
        lines = read_lines(file)
        read = sum(line.size for line in islice(lines, out.done))
        if out.done:
            log.info("%s holds %s records already", batch.files.out, f"{out.done:,}")
        defaults = Defaults(batch.n, chosen, out.state["seed"], format_of(model))
        done, failed, new_bytes, started = out.done, out.failed, 0, time.perf_counter()
        with _progress(batch, file, read) as advance:
            for record in batches.run(scheduler, lines, defaults, most=most, first=out.done):
                out.write(record.content)
                advance(record.size)
                done, failed, new_bytes = done + 1, failed + record.failed, new_bytes + record.new_bytes
    _report(done, failed, new_bytes, time.perf_counter() - started)


def _report(done: int, failed: int, new_bytes: int, seconds: float) -> None:
    speed = f", {new_bytes / seconds:,.0f} bytes/s" if new_bytes else ""
    log.info("%s lines, %s new bytes in %.2f s%s", f"{done:,}", f"{new_bytes:,}", seconds, speed)
    if failed:
        raise BltError(f"{failed:,} of {done:,} lines have an error, which their records name")


@contextmanager
def _opened(batch: Batch) -> Iterator[BinaryIO]:
    """The input. Raises UsageError if it cannot be read, and InputError if it has changed in the meantime."""
    if batch.files.jsonl == "-":
        yield sys.stdin.buffer
        return
    path = Path(str(batch.files.jsonl))
    try:
        file = reading.open_plain(path)
    except OSError as error:
        raise UsageError(f"--jsonl {path}: {reading.reason(error)}") from error
    with file:
        before = _version(file)
        yield file
        if _version(file) != before:
            raise InputError(f"{path} was changed while it was read: begin anew with --force")


def _version(file: BinaryIO) -> tuple[int, int]:
    info = os.fstat(file.fileno())
    return info.st_size, info.st_mtime_ns


@contextmanager
def _output(batch: Batch, file: BinaryIO, provider: str) -> Iterator[Output]:
    from blt.generate.output import Output, open_output

    seed = secrets.randbits(53) if batch.chosen.seed is None else batch.chosen.seed
    if batch.files.out == "-":
        yield Output(generation.write_bytes, {"seed": seed})
        return
    path = Path(str(batch.files.out))
    if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
        raise UsageError(f"-o {path} is the input: choose another name")
    with open_output(path, _description(batch, file, provider), {"seed": seed}, force=batch.files.force) as output:
        yield output


def _description(batch: Batch, file: BinaryIO, provider: str) -> dict[str, Any]:
    """What the records depend on: the model, the input and the options, but not the number of streams. Devices round
    differently, so the provider is part of it, unless it is the CPU's."""
    from blt_runtime.text import listed_stops

    sampling = {name: getattr(batch.chosen, name) for name in NAMES}
    stop = [to_bytes(stop).decode(errors="backslashreplace") for stop in listed_stops(batch.chosen.stop)]
    manifest = (batch.model / "manifest.json").read_bytes()
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    size = file.tell()
    file.seek(0)
    return {
        "model": hashlib.sha256(manifest).hexdigest(),
        "input": {"bytes": size, "sha256": digest.hexdigest()},
        "options": {"n": batch.n, **sampling, "stop": stop, **batch.constraint.texts()},
        **({} if provider == "cpu" else {"provider": provider}),
    }


@contextmanager
def _progress(batch: Batch, file: BinaryIO, read: int) -> Iterator[console.Advance]:
    """By bytes of the input after the first `read`: its number of lines is not known."""
    left = 0 if batch.files.jsonl == "-" else os.fstat(file.fileno()).st_size - read
    if not left:
        yield lambda units=1: None
        return
    with console.progress("generate", left) as advance:
        yield advance
