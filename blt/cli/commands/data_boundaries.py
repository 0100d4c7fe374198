"""`blt data boundaries`: the patch boundaries of a data folder, as bits, before any training.

Not here: the computation (`blt.data.boundary_pass`), the files (`blt.data.boundaries`).
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blt.cli import console, devices, options
from blt_runtime.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from blt.data.boundaries import Plan
    from blt.train.config import BLTRun, PatchingConfig

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@options.verbosity
@options.takes(options.ModelOptions, "threads")
def boundaries(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A data folder (blt data prepare).")],
    entropy_model: Annotated[
        Path | None,
        typer.Option(
            "--entropy-model",
            metavar="MODEL",
            callback=options.existing_model,
            help="Trained entropy model (default: entropy_model of the configuration).",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Folder to write (default: DATA/boundaries/NAME by the rule)."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "-c",
            "--config",
            metavar="FILE",
            help="Configuration of the BLT: its patch rule and groups (default: none).",
        ),
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=value", help="Replace one value of the configuration; repeatable."),
    ] = None,
    mean_patch: Annotated[
        float | None,
        typer.Option(
            "--mean-patch", metavar="BYTES", help="Choose the threshold for this mean patch size (default: 4.5)."
        ),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Threshold in nats (default: one is chosen).")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule", metavar="global|monotonic", help="Threshold on the entropy or on its rise (default: global)."
        ),
    ] = None,
    max_patch_length: Annotated[
        int | None, typer.Option("--max-patch-length", min=2, help="Longest patch in bytes (default: 16).")
    ] = None,
    splits: Annotated[str, typer.Option("--splits", metavar="A,B", help="Splits to read.")] = "train,valid",
    dtype: Annotated[
        str, typer.Option("--dtype", help="fp32, or bf16: faster; the boundaries that flip are counted on a sample.")
    ] = "fp32",
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="I/N",
            help="Compute part I (from 0) of N, in any order and at any time (default: the rank under torchrun).",
        ),
    ] = None,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the entropy model.")] = False,
    device: Annotated[
        str, typer.Option("--device", help="Device: cpu, cuda[:n], or auto: a GPU if there is one.")
    ] = "auto",
    *,
    how: options.ModelOptions,
    as_json: options.Json = False,
) -> None:
    """Compute the patch boundaries of a data folder, one bit a byte, shard by shard; `blt train blt` reads them.

    Run again after a kill: shards that are complete are kept. Under torchrun, ranks share the shards.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: choose fp32 or bf16")
    if rule not in (None, "global", "monotonic"):
        raise UsageError(f"--rule {rule}: choose global or monotonic")
    if mean_patch is not None and threshold is not None:
        raise UsageError("--mean-patch chooses a threshold and --threshold gives one; leave one of them out")
    part, parts = _part(task)
    devices.check_name(device)
    from blt.data import boundary_pass
    from blt.data.boundaries import FOLDER
    from blt.data.dataset import Dataset
    from blt.train.inputs import frozen_entropy

    run = _config(config, set)
    given = {
        "threshold": threshold,
        "target_patch_size": mean_patch,
        "monotonic": None if rule is None else rule == "monotonic",
        "max_patch_length": max_patch_length,
    }
    patching = _patching(run, {key: value for key, value in given.items() if value is not None})
    groups = run.data.groups if run is not None else None
    path = entropy_model or (run.entropy_model if run is not None else None)
    devices.limit_torch_threads(how.threads)
    dataset = Dataset(data)
    names = tuple(splits.split(","))
    dataset.check(*[name for name in names if dataset.split(name)])
    model = frozen_entropy(path, _device(device))
    request = boundary_pass.Request(
        names,
        patching.rule(0.0),
        target_patch_size=patching.target_patch_size if patching.needs_threshold else None,
        groups=groups,
        dtype="float32" if dtype == "fp32" else "bfloat16",
        compile=compile,
    )
    folder = out or data / FOLDER / boundary_pass.folder_name(model, request)
    plan = boundary_pass.plan_for(dataset, model, request, folder)
    began = time.monotonic()
    tokens = boundary_pass.compute(dataset, model, plan, folder, part, parts, compile=compile)
    report = _report(folder, plan, tokens=tokens, seconds=time.monotonic() - began)
    if as_json:
        console.print_json("blt.boundaries/1", report)
    else:
        console.print_tree(report)


def _part(task: str | None) -> tuple[int, int]:
    """This process's part and the number of parts: those of `--task`, or its rank under torchrun. Raises UsageError."""
    ranks = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    if task is not None:
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", task)
        if found is None or not int(found[1]) < int(found[2]):
            raise UsageError(f"--task {task}: write I/N with I from 0 to N - 1, such as 0/8")
        if (ranks["WORLD_SIZE"] or "1") != "1":
            raise UsageError("--task and torchrun both divide the shards; use one of them")
        return int(found[1]), int(found[2])
    rank, world = (int(text) if text and text.isdigit() else None for text in ranks.values())
    if world in (None, 1):
        return 0, 1
    if rank is None or not rank < world:
        raise UsageError(f"WORLD_SIZE is {world} and RANK {ranks['RANK']}; start several processes by torchrun")
    return rank, world


def _device(name: str) -> str:
    """The device of this process: under torchrun, that of its local rank."""
    local = os.environ.get("LOCAL_RANK", "")
    found = devices.torch_device(name)
    return devices.torch_device(f"cuda:{int(local)}") if found == "cuda" and local.isdigit() else found


def _config(path: Path | None, overrides: list[str] | None) -> BLTRun | None:
    from blt.train.config import BLTRun, load_config

    if path is None:
        if overrides:
            raise UsageError("--set replaces values of a configuration; name one with -c FILE")
        return None
    config = load_config(path, overrides or [])
    if not isinstance(config, BLTRun):
        raise ConfigError(f"{path} is for `blt train {config.kind}`; give the configuration of a BLT")
    return config


def _patching(config: BLTRun | None, given: dict[str, Any]) -> PatchingConfig:
    """The patch rule of the configuration (by default that of no configuration), with what was given instead."""
    from pydantic import ValidationError

    from blt.train.config import PatchingConfig

    before = {} if config is None else config.patching.model_dump()
    chosen = {"threshold": None} if "target_patch_size" in given else {}
    try:
        patching = PatchingConfig.model_validate(before | chosen | given)
    except ValidationError as error:
        raise UsageError(f"the patch rule: {error.errors()[0]['msg']}") from None
    if patching.scheme != "entropy":
        raise UsageError(f"the scheme {patching.scheme} needs no stored boundaries: they follow from the text")
    return patching


def _report(folder: Path, plan: Plan, *, tokens: int, seconds: float) -> dict[str, Any]:
    """What is in the folder now, and what this process computed."""
    from blt.data.boundaries import record_of

    found = [(shard, record) for _, shard in plan.names() if (record := record_of(folder, shard)) is not None]
    n_bytes = sum(record.tokens - 2 * shard.documents for shard, record in found)
    patches = sum(record.patches - shard.documents for shard, record in found)  # the patch of BOS is not counted
    report: dict[str, Any] = {
        "path": str(folder),
        "threshold": plan.rule.threshold,
        "shards": len(found),
        "missing_shards": len(plan.names()) - len(found),
        "bytes": n_bytes,
        "bytes_per_patch": n_bytes / max(1, patches),
        "computed": {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / max(seconds, 1e-9)},
    }
    if plan.flips is not None:
        flips = plan.flips
        report["flips"] = {
            "sample_tokens": flips.tokens,
            "boundaries": flips.boundaries,
            "lost": flips.lost,
            "new": flips.new,
        }
    return report
