"""`blt train`: trains an entropy model, then a BLT on its patches; or the token-level baseline."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from blt.cli import console, devices, options
from blt_runtime.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from blt.train.config import RunConfig

Kind = Literal["entropy", "blt", "bpe"]

app = typer.Typer(no_args_is_help=True, help="Train a model from a configuration.")

Config = Annotated[
    Path, typer.Option("-c", "--config", metavar="FILE", help="Configuration in YAML; examples are in configs/.")
]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of all three commands, besides the configuration and the threads. None is the configuration's value."""

    data: Annotated[Path | None, typer.Option("--data", metavar="DIR", help="Data folder (default: data.path).")] = None
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="RUN", help="Folder of the run; --dry-run needs none.")
    ] = None
    resume: Annotated[
        str,
        typer.Option(
            "--resume", help="auto (the newest checkpoint of RUN, if any), none, or the path of a checkpoint or run."
        ),
    ] = "auto"
    force: Annotated[bool, typer.Option("--force", help="Train into a folder that contains something else.")] = False
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps to train (default: schedule.steps).")] = (
        None
    )
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the training step (default: run.compile).")
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print size, FLOPs, memory and, with --data, padding; train nothing.")
    ] = False
    ranks: Annotated[
        int,
        typer.Option("--ranks", min=1, help="Processes for which --dry-run estimates memory; torchrun starts them."),
    ] = 1
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile",
            metavar="FIRST:LAST",
            help="Profile these steps, such as 20:25: a trace in RUN/profile and a table of where the time goes "
            "(default: none).",
        ),
    ] = None
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=value", help="Replace one value of the configuration; repeatable."),
    ] = None
    dtype: Annotated[str | None, typer.Option("--dtype", help="fp32 or bf16 (default: run.dtype).")] = None
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="Seed of the weights and of the order of the data (default: run.seed)."),
    ] = None
    device: Annotated[str, typer.Option("--device", help="Device: cpu, cuda[:n], or auto: a GPU if there is one.")] = (
        "auto"
    )

    def load_config(self, path: Path, kind: Kind) -> RunConfig:
        """The configuration at `path`, with --set and then --dtype, --seed and --steps applied.

        Raises ConfigError if it configures another kind of model.
        """
        from blt.train.config import load_config

        keys = {"run.dtype": self.dtype, "run.seed": self.seed, "schedule.steps": self.steps}
        last = [f"{key}={value}" for key, value in keys.items() if value is not None]
        config = load_config(path, [*(self.set or []), *last])
        if config.kind != kind:
            raise ConfigError(f"{path} is for `blt train {config.kind}`, not `blt train {kind}`")
        return config


def _add_command(kind: Literal["entropy", "bpe"], text: str) -> None:
    """Adds the command of a kind of model that has no patches."""

    @app.command(kind, help=text)
    @options.verbosity
    @options.takes(options.ModelOptions, "threads")
    @options.takes(TrainOptions)
    def command(
        config: Config, *, given: TrainOptions, how: options.ModelOptions, as_json: options.Json = False
    ) -> None:
        _run(given.load_config(config, kind), given=given, how=how, as_json=as_json)


_add_command("entropy", "Train the byte-level model whose entropies place the patch boundaries.")


@app.command("blt")
@options.verbosity
@options.takes(options.ModelOptions, "threads")
@options.takes(TrainOptions)
def blt(
    config: Config,
    *,
    given: TrainOptions,
    entropy_model: Annotated[
        Path | None,
        typer.Option(
            "--entropy-model",
            metavar="MODEL",
            callback=options.existing_model,
            help="Trained entropy model that places the boundaries (default: entropy_model of the configuration).",
        ),
    ] = None,
    boundaries: Annotated[
        Path | None,
        typer.Option(
            "--boundaries",
            metavar="DIR",
            help="Stored boundaries of `blt data boundaries` (default: those in DATA/boundaries that fit, if any).",
        ),
    ] = None,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Train a BLT; a frozen entropy model computes the patch boundaries ahead of the step."""
    how = replace(how, entropy_model=entropy_model)
    _run(given.load_config(config, "blt"), given=given, how=how, as_json=as_json, boundaries=boundaries)


_add_command("bpe", "Train the baseline: a transformer over BPE tokens, whose vocabulary is trained on the data first.")


def _run(
    config: RunConfig,
    *,
    given: TrainOptions,
    how: options.ModelOptions,
    as_json: bool,
    boundaries: Path | None = None,
) -> None:
    how = replace(how, device=given.device)
    if given.dry_run:
        _dry_run(config, given.data, ranks=given.ranks, how=how, as_json=as_json, boundaries=boundaries)
    elif given.ranks != 1:
        raise UsageError("--ranks is for --dry-run; start several processes by torchrun")
    else:
        _train(config, given=given, how=how, as_json=as_json, boundaries=boundaries)


def _dry_run(
    config: RunConfig,
    data: Path | None,
    *,
    ranks: int,
    how: options.ModelOptions,
    as_json: bool,
    boundaries: Path | None,
) -> None:
    """Prints the costs of the configuration. With data, they use its patches or tokens, and the report has the packing
    of its first block."""
    from blt.train import dry_run

    if data is None:
        report = dry_run(config, ranks=ranks)
    else:
        from blt.train.batching import packing_report
        from blt.train.inputs import prepare_inputs
        from blt.train.parallel import micro_rows

        devices.limit_torch_threads(how.threads)
        device = devices.torch_device(how.device)
        inputs = prepare_inputs(
            config, data, entropy_model=how.entropy_model, boundaries=boundaries, device=device, splits=("train",),
            steps=1,
        )  # fmt: skip
        rows = micro_rows(inputs.config.batch, ranks)
        report = inputs.dry_run(ranks) | {"packing": packing_report(inputs.training, rows, blocks=1)}
    if as_json:
        by_part = {key: console.snake_case(report[key]) for key in ("parameters_by_part", "flops_per_byte_by_part")}
        console.print_json("blt.dry-run/2", report | by_part)
    else:
        console.print_tree(report)


def _train(
    config: RunConfig, *, given: TrainOptions, how: options.ModelOptions, as_json: bool, boundaries: Path | None
) -> None:
    from blt.train import train

    if given.out is None:
        raise UsageError("name the folder of the run with -o RUN")
    device = devices.torch_device(how.device)
    devices.limit_torch_threads(how.threads)
    path = train(
        config,
        given.out,
        data=given.data,
        entropy_model=how.entropy_model,
        boundaries=boundaries,
        resume=given.resume,
        force=given.force,
        compile=given.compile,
        device=device,
        profile=None if given.profile is None else _steps(given.profile),
    )
    if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun started, only the first prints
        return
    if as_json:
        console.print_json("blt.train/1", {"model": path} | _final_numbers(given.out))
    else:
        console.say(str(path))


def _steps(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise UsageError(f"--profile {text}: write the first and the last step, such as 20:25")
    return int(first), int(last)


def _final_numbers(out: Path) -> dict[str, object]:
    """Where the run stands, by its metrics: steps, bytes, FLOPs, seconds, bits per byte."""
    from blt.figures.metrics import read_run

    summary = read_run(out, out.name).summary()
    return {key: value for key, value in summary.items() if key not in ("label", "path")}
