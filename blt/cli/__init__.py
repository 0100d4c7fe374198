"""The command line: `blt COMMAND`. One file per command; heavy libraries are imported inside the commands.

`blt --help` and completion load neither torch nor onnx (torch alone costs 1.4 s).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from blt import __version__
from blt.cli import console, failures
from blt.cli.commands import (
    bench,
    bench_throughput,
    build,
    calibrate,
    chat,
    check,
    convert,
    data,
    data_boundaries,
    env,
    evaluate,
    export,
    generate,
    inspect,
    lm_eval,
    patch,
    plot,
    pull,
    push,
    score,
    serve,
    train,
)
from blt.cli.options import Command

__all__ = ["app", "main"]

STAGES: dict[str, dict[str, Command | typer.Typer]] = {
    "Data and patches": {"data": data.app, "patch": patch.patch, "calibrate": calibrate.calibrate},
    "Train": {"train": train.app},
    "Evaluate": {"eval": evaluate.evaluate, "lm-eval": lm_eval.lm_eval, "score": score.score, "check": check.check},
    "Export": {"export": export.export, "build": build.build, "convert": convert.convert},
    "Generate": {"generate": generate.generate, "chat": chat.chat},
    "Serve": {"serve": serve.serve},
    "Share": {"push": push.push, "pull": pull.pull},
    "Tools": {"bench": bench.app, "inspect": inspect.inspect, "plot": plot.plot, "env": env.env},
}
"""The panels of `blt --help` and their commands, in the order of the way from text to a running model."""
SETTINGS = {"lm-eval": lm_eval.SETTINGS}


class _InOrder(TyperGroup):
    """Lists the commands as `STAGES` does; typer would put groups of commands last."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for commands in STAGES.values() for name in commands]


app = typer.Typer(
    name="blt",
    cls=_InOrder,
    help="Byte Latent Transformers: train in PyTorch, export to ONNX, run without PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for stage, commands in STAGES.items():
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=stage)
        else:
            app.command(name, rich_help_panel=stage, context_settings=SETTINGS.get(name))(command)
bench.app.command("throughput")(bench_throughput.throughput)
data.app.command("boundaries")(data_boundaries.boundaries)


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
    """Runs one command and returns its exit code; raises nothing."""
    console.start_logging()
    try:
        result = typer.main.get_command(app).main(
            args=None if argv is None else list(argv), prog_name="blt", standalone_mode=False
        )
        sys.stdout.flush()
    except BaseException as error:
        found = failures.original(error)
        if isinstance(found, SystemExit):
            return found.code if isinstance(found.code, int) else failures.FAILED
        return failures.report(found)
    return result if isinstance(result, int) else failures.OK


def _terminate(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    """Entry point of the script `blt`."""
    signal.signal(signal.SIGTERM, _terminate)  # as Ctrl-C does: half-written files are removed before the process ends
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell, as in `>&-`
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  open until the process ends
    code = run()
    try:
        sys.stdout.flush()
    except OSError:  # keep the interpreter from flushing into a closed pipe or a full disk once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
