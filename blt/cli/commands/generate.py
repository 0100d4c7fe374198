"""`blt generate`: continue a prompt. stdout gets the new text only, each piece as soon as it is complete."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, cast

import typer

from blt.cli import console, generation, inputs, models, options
from blt.cli.commands import generate_batch
from blt_runtime.errors import CapacityError, UsageError
from blt_runtime.grammar import GrammarSampler
from blt_runtime.options import resolve

if TYPE_CHECKING:
    from blt_runtime.speculation.speculate import Speculate
    from blt_runtime.stream import Overflow

log = logging.getLogger("blt.cli")
SLIDE = "--overflow slide"


def _prompt_bytes(prompt: str | None, file: str | None, unconditional: bool) -> bytes:
    if file is not None:
        if prompt is not None or unconditional:
            raise UsageError("--file names the prompt; leave PROMPT and --unconditional out")
        return inputs.read_file(file)
    given = b"" if prompt is None else inputs.text_bytes(prompt)
    if given and unconditional:
        raise UsageError("--unconditional starts without a prompt; leave one of them out")
    if not given and not unconditional:
        raise UsageError("the prompt is empty; give some text, - for standard input, --file FILE, or --unconditional")
    return given


def _check_batched(alone: Mapping[str, object], how: options.ModelOptions) -> None:
    """Raises UsageError for options that --jsonl does not have. alone: those of a single prompt, with their values."""
    usual = options.ModelOptions()
    of_model = {"--entropy-model": "entropy_model", "--entropy-dtype": "entropy_dtype", "--device": "device"}
    of_model |= {"--engine-cache": "engine_cache"}
    other = {option: getattr(how, name) != getattr(usual, name) for option, name in of_model.items()}
    for option, given in {**alone, "--backend torch": how.backend == "torch", **other}.items():
        if given:
            raise UsageError(f"{option} is for a single prompt: leave it out, or leave --jsonl out")


def _check_room(prompt: int, new: int, capacity: int) -> None:
    """Raises CapacityError unless a stream of `capacity` tokens holds BOS, the prompt and the new bytes."""
    room = capacity - 1 - prompt
    if new <= room:
        return
    if room < 1:
        raise CapacityError(
            f"the prompt has {prompt:,} bytes, this model's capacity is {capacity:,}: give a shorter prompt, "
            f"add {SLIDE}, or export with a larger --capacity"
        )
    raise CapacityError(
        f"-n {new:,}: after a prompt of {prompt:,} bytes, this model's capacity of {capacity:,} has room for {room:,}: "
        f"give -n {room} or less, add {SLIDE}, or export with a larger --capacity"
    )


def _write(pieces: Iterable[bytes], raw: bool, stream_out: bool) -> None:
    """Writes to stdout piece by piece, or all at the end: raw bytes, or complete UTF-8 characters only."""
    if not stream_out:
        pieces = [b"".join(pieces)]
    if not raw:
        generation.write_text(pieces)
        if sys.stdout.isatty():
            print()
        return
    for data in pieces:
        generation.write_bytes(data)


@options.verbosity
@options.takes(options.SamplingOptions)
@options.takes(options.GrammarOptions)
@options.takes(generate_batch.BatchOptions)
@options.takes(
    options.ModelOptions, "backend", "entropy_model", "entropy_dtype", "device", *options.ON_DEVICES, "threads"
)
def generate(
    model: options.ModelPath,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT|-]", help="Text to continue; - reads standard input.")
    ] = None,
    n: Annotated[str, typer.Option("-n", "--new-bytes", metavar="SIZE", help="Bytes to generate.")] = "256",
    *,
    sampling: options.SamplingOptions,
    constraint: options.GrammarOptions,
    file: Annotated[str | None, typer.Option("--file", metavar="FILE", help="Read the prompt from this file.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after the end of a document.")] = False,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Generate without a prompt.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Write the bytes as they are, valid UTF-8 or not.")] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Write the whole text at the end.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed and mean patch size on stderr.")] = False,
    speculate: options.Speculate = "off",
    overflow: options.Overflow = "error",
    files: generate_batch.BatchOptions,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Continue PROMPT with a model. Only the new text is written to stdout. --jsonl continues many prompts."""
    size = options.parse_size(n, "-n")
    if raw and as_json:
        raise UsageError("--raw writes bytes and --json writes text; leave one of them out")
    chosen = sampling.generate_options(
        stop=[os.fsencode(text) for text in stop or []],
        stop_at_eos=not ignore_eos,
        speculate=cast("Speculate", speculate),
    )
    if files.jsonl is not None:
        alone = {"PROMPT": prompt, "--file": file, "--unconditional": unconditional, "--raw": raw, "--stats": stats}
        alone |= {"--no-stream": no_stream, "--json": as_json, "--overflow": overflow != "error"}
        _check_batched(alone | {"--speculate": speculate != "off"}, how)
        generate_batch.run(
            generate_batch.Batch(model=model, files=files, n=size, chosen=chosen, constraint=constraint, how=how)
        )
        return
    given = _prompt_bytes(prompt, file, unconditional)
    grammar = constraint.compiled()
    if grammar is not None and ignore_eos:
        raise UsageError("--ignore-eos: a text ends where its grammar does; leave it out")
    sampler = resolve(chosen, {"grammar": grammar}).sampler()
    with models.open_model(model, how) as opened:
        stream = opened.stream(bos=True, seed=sampling.seed, overflow=cast("Overflow", overflow))
        if overflow == "error":
            _check_room(len(given), size, opened.spec.capacity_bytes)
        timing = generation.Timing(len(given))
        try:
            stream.append(given)
            pieces = timing.timed(stream.generate(size, sampler=sampler, options=chosen))
            if as_json:
                text = "".join(generation.texts(pieces))
                complete = sampler.complete if isinstance(sampler, GrammarSampler) else None
                report = {"text": text, "complete": complete, **timing.summary(stream)}
                console.print_json("blt.generate/1", report)
            else:
                _write(pieces, raw, not no_stream)
        except CapacityError as error:  # too many patches, which is known only when the text is there
            raise CapacityError(f"{error}, or add {SLIDE}") from error
    if isinstance(sampler, GrammarSampler) and not sampler.complete:
        log.warning("the text ended before it matched the grammar: it is a prefix of a match (-n %s)", n)
    if stats:
        console.to_stderr(generation.stats_line(timing.summary(stream)))
