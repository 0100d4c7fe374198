"""`train`: from a configuration and a data folder to a run folder with metrics, checkpoints and model.pt."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import torch

from blt import checkpoint
from blt.config import RunConfig
from blt.train import snapshots
from blt.train.jobs import prepare_run
from blt.train.loop import Trainer
from blt.train.metrics import replace_text
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
    "none" (refused if `out` has some) or a checkpoint's path; `force` trains into a folder that holds something else.
    Raises UsageError, InputError, ConfigError, CheckpointError, and Terminated after SIGTERM with everything saved.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise UsageError("training in several processes is not supported yet; start one, without torchrun")
    _check_target(Path(out), force)
    trainer, finish = prepare_run(config, Path(out), data, entropy_model, compile, device)
    _resume(trainer, resume)
    Path(out).mkdir(parents=True, exist_ok=True)
    replace_text(Path(out) / CONFIG_FILE, json.dumps(config.model_dump(mode="json"), indent=1) + "\n")
    trainer.metrics.cut(trainer.step)
    trainer.run(config.schedule.steps)
    path = Path(out) / checkpoint.MODEL_FILE
    checkpoint.save(path, finish(), DTYPES[config.run.save_dtype])
    log.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)
    return path


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
        return json.loads(config_file.read_text())["kind"] in ("entropy", "blt")
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _resume(trainer: Trainer, resume: str) -> None:
    if resume == "none":
        if snapshots.snapshots(trainer.folder):
            raise ConfigError(
                f"{trainer.out} holds a run; resume it with --resume auto, or choose another output folder"
            )
        return
    if resume == "auto":
        content = snapshots.read_newest(trainer.folder)
    else:
        path = Path(resume)
        if not path.exists():
            raise UsageError(f"--resume {path}: no such file or folder; give auto, none, or a checkpoint")
        content = snapshots.read(path) if path.is_file() else snapshots.read_newest(_snapshot_folder(path))
        if content is None:
            raise CheckpointError(f"{path}: no checkpoint to resume from")
    if content is not None:
        if content["extra"] != trainer.extra:
            raise CheckpointError(
                "the checkpoint used other data, another patch rule or entropy model; "
                "use the same, or start anew in another output folder"
            )
        trainer.restore(content)
        log.info("resumed at step %d", trainer.step)


def _snapshot_folder(path: Path) -> Path:
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path
