"""`blt generate`: continue a prompt. stdout gets the new text only, each piece as soon as it is complete."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from blt.cli import console, inputs, models, options
from blt_runtime.errors import CapacityError, UsageError
from blt_runtime.options import GenerateOptions

if TYPE_CHECKING:
    from blt_runtime import Stream
    from blt_runtime.speculation.speculate import Speculate
    from blt_runtime.stream import Overflow

DEFAULTS = GenerateOptions()
SLIDE = "--overflow slide"


@dataclass
class Timing:
    """When each piece was generated, in seconds since `started`, which is before the prompt is read."""

    prompt_bytes: int
    started: float = field(default_factory=time.perf_counter)
    first_byte: float | None = None
    last_byte: float = 0.0
    n_bytes: int = 0

    def timed(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Yields `pieces` and records their times."""
        for piece in pieces:
            self.last_byte = time.perf_counter() - self.started
            if piece and self.first_byte is None:
                self.first_byte = self.last_byte
            self.n_bytes += len(piece)
            yield piece

    def summary(self, stream: Stream) -> dict[str, Any]:
        """Numbers of `--stats` and `--json`. Bytes per second leave out the first byte, and with it the prompt."""
        first = self.first_byte if self.first_byte is not None else self.last_byte
        spent = self.last_byte - first
        lengths = [int(n) for n in stream.patch_lengths]
        lengths[-1] -= 1  # the next token, which is not generated yet
        lengths = [n for n in lengths[1:] if n > 0]  # the first patch is BOS alone
        return {
            "prompt_bytes": self.prompt_bytes,
            "new_bytes": self.n_bytes,
            "seconds": round(self.last_byte, 6),
            "time_to_first_byte_s": round(first, 6),
            "bytes_per_s": round((self.n_bytes - 1) / spent, 2) if spent > 0 and self.n_bytes > 1 else None,
            "mean_patch_bytes": round(sum(lengths) / len(lengths), 3) if lengths else None,
            "forgotten_bytes": stream.forgotten,
            "bytes_per_pass": round(stream.speculation.tokens_per_pass, 3) if stream.speculation.passes else None,
        }


def _stats_line(stats: dict[str, Any]) -> str:
    speed, patch, per_pass = stats["bytes_per_s"], stats["mean_patch_bytes"], stats["bytes_per_pass"]
    parts = [f"{stats['new_bytes']:,} bytes in {stats['seconds']:.2f} s"]
    parts += [f"{speed:,.0f} bytes/s"] if speed is not None else []
    parts += [f"time to first byte {1000 * stats['time_to_first_byte_s']:,.0f} ms"]
    parts += [f"mean patch {patch:.2f} bytes"] if patch is not None else []
    parts += [f"{per_pass:.2f} bytes per decoder pass"] if per_pass is not None else []
    parts += [f"forgot the oldest {stats['forgotten_bytes']:,} bytes"] if stats["forgotten_bytes"] else []
    return ", ".join(parts)


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
    for data in pieces if raw else (text.encode() for text in _texts(pieces)):
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    if not raw and sys.stdout.isatty():
        print()


def _texts(pieces: Iterable[bytes]) -> Iterator[str]:
    from blt_runtime.text import Utf8Stream

    decoder = Utf8Stream()
    for piece in pieces:
        if text := decoder.feed(piece):
            yield text
    if tail := decoder.flush():
        yield tail


@options.verbosity
@options.takes(options.ModelOptions, "backend", "entropy_model", "entropy_dtype", "device", "threads")
def generate(
    model: options.ModelPath,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT|-]", help="Text to continue; - reads standard input.")
    ] = None,
    n: Annotated[str, typer.Option("-n", "--new-bytes", metavar="SIZE", help="Bytes to generate.")] = "256",
    temperature: options.Temperature = DEFAULTS.temperature,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample from the K most likely bytes (default: all).")
    ] = DEFAULTS.top_k,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the fewest bytes that together have this probability (default: all)."),
    ] = DEFAULTS.top_p,
    min_p: Annotated[
        float | None,
        typer.Option(help="Drop bytes with less than this share of the highest probability (default: none)."),
    ] = DEFAULTS.min_p,
    file: Annotated[str | None, typer.Option("--file", metavar="FILE", help="Read the prompt from this file.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Continue after the end of a document.")] = False,
    unconditional: Annotated[bool, typer.Option("--unconditional", help="Generate without a prompt.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Write the bytes as they are, valid UTF-8 or not.")] = False,
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Write the whole text at the end.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed and mean patch size on stderr.")] = False,
    speculate: options.Speculate = "off",
    overflow: Annotated[
        str, typer.Option(help="When the text exceeds the model's capacity: error, or slide (forget the older half).")
    ] = "error",
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Seed of the sampling (default: another in each run).")
    ] = DEFAULTS.seed,
    *,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Continue PROMPT with a model. Only the new text is written to stdout."""
    size = options.parse_size(n, "-n")
    if raw and as_json:
        raise UsageError("--raw writes bytes and --json writes text; leave one of them out")
    sampling = GenerateOptions(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=[os.fsencode(text) for text in stop or []],
        stop_at_eos=not ignore_eos,
        speculate=cast("Speculate", speculate),
    )
    given = _prompt_bytes(prompt, file, unconditional)
    with models.open_model(model, how) as opened:
        stream = opened.stream(bos=True, seed=seed, overflow=cast("Overflow", overflow))
        if overflow == "error":
            _check_room(len(given), size, opened.spec.capacity_bytes)
        timing = Timing(len(given))
        try:
            stream.append(given)
            pieces = timing.timed(stream.generate(size, options=sampling))
            if as_json:
                text = "".join(_texts(pieces))
                console.print_json("blt.generate/1", {"text": text, **timing.summary(stream)})
            else:
                _write(pieces, raw, not no_stream)
        except CapacityError as error:  # too many patches, which is known only when the text is there
            raise CapacityError(f"{error}, or add {SLIDE}") from error
    if stats:
        console.to_stderr(_stats_line(timing.summary(stream)))
