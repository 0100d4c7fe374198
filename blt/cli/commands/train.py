"""`blt train`: train an entropy model, then a BLT on its patches; or the token-level baseline."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from blt.cli import console, devices, options
from blt_runtime.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from blt.train.config import RunConfig

app = typer.Typer(no_args_is_help=True, help="Train a model from a configuration.")

Config = Annotated[Path, typer.Option("-c", "--config", metavar="FILE", help="YAML, see configs/.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=value", help="Replace one value; repeatable.")]
Data = Annotated[Path | None, typer.Option("--data", metavar="DIR", help="Folder made by blt data prepare.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", metavar="RUN", help="Folder of the run.")]
Resume = Annotated[str, typer.Option(help="auto, none, or the path of a checkpoint or run.")]
Force = Annotated[bool, typer.Option("--force", help="Train into a folder that holds something else.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Length of the schedule.")]
Compile = Annotated[bool | None, typer.Option("--compile/--no-compile", help="Compile the step.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print size, FLOPs, memory and, with --data, padding; train nothing.")
]
DType = Annotated[str | None, typer.Option(help="fp32 or bf16.")]


def _add_command(kind: Literal["entropy", "bpe"], text: str) -> None:
    """A command for a kind of model that reads no patches."""

    @app.command(kind, help=text)
    def command(
        config: Config,
        data: Data = None,
        out: Out = None,
        resume: Resume = "auto",
        force: Force = False,
        steps: Steps = None,
        compile: Compile = None,
        dry_run: DryRun = False,
        set: Set = None,
        device: options.Device = "auto",
        dtype: DType = None,
        seed: options.Seed = None,
        threads: options.Threads = None,
        as_json: options.Json = False,
        quiet: options.Quiet = False,
        verbose: options.Verbose = 0,
    ) -> None:
        run = _load(kind, config, set, dtype, seed, steps)
        if dry_run:
            _dry_run(run, data, None, device, threads, as_json)
        else:
            _train(run, out, data, None, resume, force, compile, device, threads, as_json)


_add_command("entropy", "Train the byte-level model whose entropies place the patch boundaries.")


@app.command("blt")
def blt(
    config: Config,
    data: Data = None,
    out: Out = None,
    entropy_model: options.EntropyModel = None,
    resume: Resume = "auto",
    force: Force = False,
    steps: Steps = None,
    compile: Compile = None,
    dry_run: DryRun = False,
    set: Set = None,
    device: options.Device = "auto",
    dtype: DType = None,
    seed: options.Seed = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
) -> None:
    """Train a BLT; the patch boundaries are computed ahead of the step by a frozen entropy model."""
    run = _load("blt", config, set, dtype, seed, steps)
    if dry_run:
        _dry_run(run, data, entropy_model, device, threads, as_json)
    else:
        _train(run, out, data, entropy_model, resume, force, compile, device, threads, as_json)


_add_command("bpe", "Train the baseline: a transformer over BPE tokens, whose vocabulary is trained on the data first.")


def _load(
    kind: Literal["entropy", "blt", "bpe"],
    path: Path,
    overrides: list[str] | None,
    dtype: str | None,
    seed: int | None,
    steps: int | None,
) -> RunConfig:
    from blt.train.config import load_config

    options_as_keys = {"run.dtype": dtype, "run.seed": seed, "schedule.steps": steps}
    last = [f"{key}={value}" for key, value in options_as_keys.items() if value is not None]
    config = load_config(path, [*(overrides or []), *last])
    if config.kind != kind:
        raise ConfigError(f"{path} is for `blt train {config.kind}`, not `blt train {kind}`")
    return config


def _dry_run(
    config: RunConfig,
    data: Path | None,
    entropy_model: Path | None,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """With data, costs of its own patches or tokens, and what the packer makes of its first block."""
    from blt.train import dry_run

    if data is None:
        report = dry_run(config)
    else:
        from blt.train.material import gather
        from blt.train.packed import packing_report

        devices.limit_torch_threads(threads)
        chosen = devices.torch_device(device)
        material = gather(config, data, entropy_model, device=chosen, splits=("train",))
        report = material.dry_run() | {"packing": packing_report(material.training, blocks=1)}
    if as_json:
        console.print_json("blt.dry-run/1", report)
    else:
        console.print_tree(report)


def _train(
    config: RunConfig,
    out: Path | None,
    data: Path | None,
    entropy_model: Path | None,
    resume: str,
    force: bool,
    compile: bool | None,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    from blt.train import train

    if out is None:
        raise UsageError("name the folder of the run with -o RUN")
    chosen = devices.torch_device(device)
    devices.limit_torch_threads(threads)
    path = train(
        config, out, data=data, entropy_model=entropy_model, resume=resume, force=force, compile=compile, device=chosen
    )
    if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun started, the first one speaks
        return
    if as_json:
        console.print_json("blt.train/1", {"model": path})
    else:
        print(path)
