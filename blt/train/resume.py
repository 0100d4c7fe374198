"""Which checkpoint a run continues from, and whether it fits the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blt.train import checkpoints
from blt.train.checkpoints import TrainingCheckpoint
from blt.train.config import RunConfig
from blt_runtime.errors import CheckpointError, ConfigError, UsageError

# Sections of the configuration (or keys of a section) that must be the same in a resumed run.
SAME: dict[str, tuple[str, ...]] = {
    "kind": (),
    "model": (),
    "tokenizer": (),
    "batch": ("rows", "patches", "byte_buckets", "pack"),
    "patching": (),
    "data": ("groups",),
    "optimizer": ("freeze", "lr_scale", "tables"),
    "run": ("seed", "dtype"),
}
# The missed updates of sparse tables were summed with these values; the dense optimizer may change them.
SAME_SPARSE = SAME | {"optimizer": (*SAME["optimizer"], "betas", "eps")}


def find_checkpoint(out: Path, folder: Path, resume: str) -> TrainingCheckpoint | None:
    """The checkpoint that `resume` names for the run `out`, whose checkpoints are in `folder`.

    "auto" is the newest one there, None if there are none; "none" is None; anything else is the path of a checkpoint
    or a run. Raises ConfigError if `folder` has checkpoints and `resume` is "none" or names one of another run, and
    UsageError or CheckpointError for a path without a checkpoint.
    """
    if resume == "auto":
        return checkpoints.read_newest(folder)
    if resume == "none":
        _check_unused(out, folder)
        return None
    checkpoint = _named(Path(resume))
    if checkpoint.path not in [path.resolve() for path in checkpoints.checkpoint_folders(folder)]:
        _check_unused(out, folder)
    return checkpoint


def check_same_run(checkpoint: TrainingCheckpoint, config: RunConfig, extra: dict[str, Any]) -> None:
    """Raises CheckpointError unless the checkpoint has the same configuration where it matters, and the same `extra`
    (data, patch rule, entropy model or vocabulary)."""
    try:
        _check_config(checkpoint.state["config"], config.model_dump(mode="json"))
        before, now = dict(checkpoint.state["extra"]), json.loads(json.dumps(extra))
    except (LookupError, TypeError, ValueError) as error:
        raise checkpoint.incomplete(error) from None
    if before.pop("first_block", None) != now.pop("first_block", None):
        raise CheckpointError(
            "the checkpoint is of a version that read the training text in another order; finish the run with that "
            "version, or start anew in another output folder"
        )
    if before != now:
        raise CheckpointError(
            "the checkpoint used other data, another patch rule or entropy model; "
            "use the same, or start anew in another output folder"
        )


def _check_config(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Settings that decide the weights' shapes or the next batch must agree; rates, schedule and logging may change."""
    sparse = new["optimizer"]["tables"] == "sparse"
    for section, keys in (SAME_SPARSE if sparse else SAME).items():
        if section not in old and section not in new:
            continue
        for key in keys or (None,):
            before, now = (config.get(section) if key is None else config[section].get(key) for config in (old, new))
            if before != now:
                where = section if key is None else f"{section}.{key}"
                raise CheckpointError(
                    f"the checkpoint was made with another {where!r}{_values(before, now)}; "
                    "use the same configuration, or start anew in another output folder"
                )


def _values(before: Any, now: Any) -> str:
    short = [value for value in (before, now) if not isinstance(value, dict)]
    return f" ({short[0]}, not {short[1]})" if len(short) == 2 else ""


def _check_unused(out: Path, folder: Path) -> None:
    """Raises ConfigError if there are checkpoints: another branch of training would be mixed with theirs."""
    if checkpoints.checkpoint_folders(folder):
        raise ConfigError(f"{out} holds a run; resume it with --resume auto, or choose another output folder")


def _named(path: Path) -> TrainingCheckpoint:
    """The checkpoint at `path`, or the newest one of the run there. Raises UsageError and CheckpointError."""
    if not path.exists():
        raise UsageError(f"--resume {path}: no such folder; give auto, none, a checkpoint or a run")
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a training checkpoint; give a folder step-* or a run folder")
    if (path / checkpoints.MANIFEST).exists():
        return checkpoints.read(path)
    within = path / checkpoints.FOLDER
    found = checkpoints.read_newest(within if within.is_dir() else path)
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint to resume from")
    return found
