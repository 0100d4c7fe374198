"""`train`: from a configuration and a data folder to a run folder with metrics, checkpoints and model.pt."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from blt.checkpoint import models
from blt.checkpoint.models import Checkpoint
from blt.checkpoint.native import MODEL_FILE
from blt.files import replace_text
from blt.train import checkpoints, parallel
from blt.train.config import KINDS, RunConfig
from blt.train.loop import Trainer
from blt.train.resume import find_checkpoint
from blt.train.setup import prepare_run
from blt_runtime import reading
from blt_runtime.errors import ConfigError, UsageError

log = logging.getLogger("blt.train")
CONFIG_FILE = "config.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    config: RunConfig,
    out: str | Path,
    *,
    data: str | Path | None = None,
    entropy_model: str | Path | None = None,
    resume: str = "auto",
    force: bool = False,
    compile: bool | None = None,
    device: str = "cpu",
) -> Path:
    """Trains and returns the path of `model.pt`.

    data, entropy_model: replace the configuration's.  resume: "auto" (the newest checkpoint in `out`, if any), "none",
    or the path of a checkpoint or run. The last two are refused if `out` has checkpoints, unless the path is one of
    them.  force: train into a folder that holds other files.

    Under torchrun every process calls it. Parameters are sharded, and the first rank writes logs, metrics and model.pt.
    Raises UsageError, InputError, ConfigError, CheckpointError, and Terminated after SIGTERM with everything saved.
    """
    _check_target(Path(out), force)
    with parallel.processes(device) as (ranks, device), _quiet_unless(ranks.first):
        if not ranks.single and config.run.attention == "flex":
            raise ConfigError(
                "run.attention: flex trains in a single process; with several ranks leave run.attention at auto"
            )
        compiled = config.run.compile if compile is None else compile
        whole_step = compiled and ranks.single  # FSDP's gathers would break the step's graph
        trainer, finish = ranks.first_then_others(
            lambda: prepare_run(
                config, Path(out), data=data, entropy_model=entropy_model, compile=whole_step, device=device
            )
        )
        trainer.distribute(ranks, compiled)
        _resume(trainer, resume)
        ranks.on_first(lambda: _begin(trainer))
        trainer.run(config.schedule.steps)
        trainer.finish()
        ranks.on_first(lambda: _end(trainer, finish))
    return Path(out) / MODEL_FILE


def _resume(trainer: Trainer, resume: str) -> None:
    """The first rank chooses and checks the checkpoint, because all ranks see the same files."""
    checkpoint = trainer.ranks.on_first(lambda: find_checkpoint(trainer.out, trainer.folder, resume))
    if checkpoint is not None:
        trainer.restore(checkpoint)
        log.info("resumed at step %d", trainer.state.step)


def _begin(trainer: Trainer) -> None:
    trainer.out.mkdir(parents=True, exist_ok=True)
    settings = trainer.config.model_dump(mode="json")
    replace_text(trainer.out / CONFIG_FILE, json.dumps(settings, indent=1) + "\n")
    trainer.metrics.cut(trainer.state.step)
    checkpoints.set_aside(trainer.folder, trainer.state.step)


def _end(trainer: Trainer, finish: Callable[[], Checkpoint]) -> None:
    path = trainer.out / MODEL_FILE
    models.save(path, finish(), DTYPES[trainer.config.run.save_dtype])
    log.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)


@contextmanager
def _quiet_unless(first: bool) -> Iterator[None]:
    """While inside, all ranks but the first log only errors."""
    package = logging.getLogger("blt")
    before = package.level
    if not first:
        package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(before)


def _check_target(out: Path, force: bool) -> None:
    """Raises UsageError if `out` is not empty and not a run. Hidden files are ignored: a killed process may leave
    some."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder for the run")
    if force or not out.is_dir() or all(path.name.startswith(".") for path in out.iterdir()):
        return
    if not checkpoints.checkpoint_folders(out / checkpoints.FOLDER) and not _is_run(out / CONFIG_FILE):
        raise UsageError(f"{out} is not empty and is no run; choose another folder, or --force to train into it")


def _is_run(config_file: Path) -> bool:
    try:
        return reading.read_json(config_file)["kind"] in KINDS
    except (OSError, ValueError, LookupError, TypeError):
        return False
