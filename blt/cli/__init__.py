"""The command line: `blt COMMAND`. One file per command; whatever is heavy is imported inside the command.

`blt --help` and completion load neither torch nor onnx (torch alone costs 1.4 s).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from blt import __version__
from blt.cli import console, failures, throughput
from blt.cli.commands import (
    bench,
    calibrate,
    check,
    convert,
    data,
    env,
    evaluate,
    export,
    generate,
    inspect,
    lm_eval,
    patch,
    plot,
    score,
    train,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="blt",
    help="Byte Latent Transformers: train in PyTorch, export to ONNX, run without PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data.app, name="data")
app.add_typer(train.app, name="train")
app.add_typer(bench.app, name="bench")
bench.app.command("throughput")(throughput.throughput)
app.command("patch")(patch.patch)
app.command("calibrate")(calibrate.calibrate)
app.command("inspect")(inspect.inspect)
app.command("eval")(evaluate.evaluate)
app.command("lm-eval", context_settings=lm_eval.SETTINGS)(lm_eval.lm_eval)
app.command("score")(score.score)
app.command("check")(check.check)
app.command("plot")(plot.plot)
app.command("export")(export.export)
app.command("convert")(convert.convert)
app.command("generate")(generate.generate)
app.command("env")(env.env)


def _version(value: bool) -> None:
    if value:
        print(f"blt {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Byte Latent Transformers: train in PyTorch, export to ONNX, run without PyTorch."""


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; nothing is raised."""
    console.start_logging()
    try:
        result = typer.main.get_command(app).main(
            args=None if argv is None else list(argv), prog_name="blt", standalone_mode=False
        )
        sys.stdout.flush()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else failures.FAILED
    except BaseException as error:
        return failures.report(error)
    return result if isinstance(result, int) else failures.OK


def _terminate(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point of the script `blt`."""
    signal.signal(signal.SIGTERM, _terminate)  # as Ctrl-C does: half-written files go before the process does
    code = run()
    if code == failures.BROKEN_PIPE:  # keep the interpreter from flushing into the closed pipe once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
