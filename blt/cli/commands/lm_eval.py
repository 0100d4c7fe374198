"""`blt lm-eval`: the command line of EleutherAI's lm-evaluation-harness, applied to a model of any of our formats."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from blt.cli import devices, options
from blt_runtime.errors import UsageError

OURS = ("--model", "-M", "--model_args", "-a")
SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


@options.takes(options.ModelOptions, "entropy_model", "device", *options.ON_DEVICES, "threads")
def lm_eval(
    context: typer.Context,
    model: options.ModelPath,
    *,
    how: options.ModelOptions,
) -> None:
    """Run tasks of lm-evaluation-harness (extra lm-eval). Other options are passed on to it: --tasks, --limit, ..."""
    for word in context.args:
        if word.split("=")[0] in OURS:
            raise UsageError(f"{word} is set by MODEL; leave it out")
    given: dict[str, Path | str | int | None] = {
        "path": model,
        "entropy_model": how.entropy_model,
        "threads": how.threads,
    }
    given |= {"provider": how.provider, "trust_engines": how.trust_engines or None, "engine_cache": how.engine_cache}
    arguments = [f"{name}={_plain(value)}" for name, value in given.items() if value is not None]
    chosen = "cpu" if how.device == "auto" else devices.torch_device(how.device)  # lm_eval's own default is cuda
    _run(["run", "--model", "blt", "--model_args", ",".join(arguments), "--device", chosen, *context.args])


def _plain(value: Path | str | int) -> str:
    """`value` as text. Raises UsageError for a comma or an equals sign, which separate the harness's arguments."""
    if "," in str(value) or "=" in str(value):
        raise UsageError(f"{value}: lm_eval reads no name with a comma or an equals sign; rename or link it")
    return str(value)


def _run(arguments: Sequence[str]) -> None:
    import lm_eval.__main__ as harness

    import blt.evaluate.lm_eval  # noqa: F401  registers the model type "blt"

    before = sys.argv
    sys.argv = ["lm_eval", *arguments]  # the harness reads sys.argv only
    try:
        harness.cli_evaluate()
    finally:
        sys.argv = before
