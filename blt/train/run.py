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
from blt.train import parallel, snapshots
from blt.train.config import KINDS, RunConfig
from blt.train.jobs import prepare_run
from blt.train.loop import Trainer
from blt.train.metrics import replace_text
from blt.train.snapshots import Snapshot
from blt_runtime.errors import CheckpointError, ConfigError, UsageError

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

    `data` and `entropy_model` replace the configuration's; `resume` is "auto" (the newest checkpoint in `out`, if any),
    "none" or the path of a checkpoint or run; the last two are refused if `out` has checkpoints of its own, which the
    path does not name. `force` trains into a folder that holds something else.
    Under torchrun every process calls it: parameters are in shards, the first rank writes logs, metrics and model.pt.
    Raises UsageError, InputError, ConfigError, CheckpointError, and Terminated after SIGTERM with everything saved.
    """
    _check_target(Path(out), force)
    with parallel.processes(device) as (ranks, device), _quiet_unless(ranks.first):
        if not ranks.alone and config.run.attention == "flex":
            raise ConfigError(
                "run.attention: flex trains in one process alone; with several ranks leave run.attention at auto"
            )
        compiled = config.run.compile if compile is None else compile
        whole_step = compiled and ranks.alone  # FSDP's gathers would break one graph
        trainer, finish = ranks.first_before_others(
            lambda: prepare_run(config, Path(out), data, entropy_model, whole_step, device)
        )
        trainer.share_out(ranks, compiled)
        _resume(trainer, resume)
        ranks.first_does(lambda: _begin(trainer))
        trainer.run(config.schedule.steps)
        trainer.finish()
        ranks.first_does(lambda: _end(trainer, finish))
    return Path(out) / MODEL_FILE


def _begin(trainer: Trainer) -> None:
    trainer.out.mkdir(parents=True, exist_ok=True)
    settings = trainer.config.model_dump(mode="json")
    replace_text(trainer.out / CONFIG_FILE, json.dumps(settings, indent=1) + "\n")
    trainer.metrics.cut(trainer.step)
    snapshots.set_aside(trainer.folder, trainer.step)


def _end(trainer: Trainer, finish: Callable[[], Checkpoint]) -> None:
    path = trainer.out / MODEL_FILE
    models.save(path, finish(), DTYPES[trainer.config.run.save_dtype])
    log.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)


@contextmanager
def _quiet_unless(first: bool) -> Iterator[None]:
    """Ranks but the first log errors alone."""
    package = logging.getLogger("blt")
    before = package.level
    if not first:
        package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(before)


def _check_target(out: Path, force: bool) -> None:
    """Raises UsageError if `out` holds something that is no run. Hidden files may be what a kill left behind."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder for the run")
    if force or not out.is_dir() or all(path.name.startswith(".") for path in out.iterdir()):
        return
    if not snapshots.snapshots(out / "checkpoints") and not _is_run(out / CONFIG_FILE):
        raise UsageError(f"{out} is not empty and no run; choose another folder, or --force to train into it")


def _is_run(config_file: Path) -> bool:
    try:
        return json.loads(config_file.read_text())["kind"] in KINDS
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _resume(trainer: Trainer, resume: str) -> None:
    """The first rank chooses and checks the snapshot, since all see the same files."""
    snapshot = trainer.ranks.first_does(lambda: _chosen(trainer, resume))
    if snapshot is not None:
        trainer.restore(snapshot)
        log.info("resumed at step %d", trainer.step)


def _chosen(trainer: Trainer, resume: str) -> Snapshot | None:
    if resume == "auto":
        return snapshots.read_newest(trainer.folder)
    if resume == "none":
        _check_unused(trainer)
        return None
    snapshot = _named(Path(resume))
    if snapshot.path not in [path.resolve() for path in snapshots.snapshots(trainer.folder)]:
        _check_unused(trainer)
    return snapshot


def _check_unused(trainer: Trainer) -> None:
    """Raises ConfigError if `out` has checkpoints: another branch of training would be mixed with theirs."""
    if snapshots.snapshots(trainer.folder):
        raise ConfigError(f"{trainer.out} holds a run; resume it with --resume auto, or choose another output folder")


def _named(path: Path) -> Snapshot:
    """The snapshot at `path`, or the newest one of the run there. Raises UsageError and CheckpointError."""
    if not path.exists():
        raise UsageError(f"--resume {path}: no such folder; give auto, none, a checkpoint or a run")
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a training checkpoint; give a folder step-* or a run folder")
    if (path / snapshots.MANIFEST).exists():
        return snapshots.read(path)
    found = snapshots.read_newest(_snapshot_folder(path))
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint to resume from")
    return found


def _snapshot_folder(path: Path) -> Path:
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path
