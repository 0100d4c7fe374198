"""Which checkpoint a run continues from, and whether it fits the run."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from blt.train import checkpoints
from blt.train.checkpoints import TrainingCheckpoint
from blt.train.config import SHORT_DECAY, OptimizerConfig, RunConfig, ScheduleConfig
from blt.train.optim import learning_rate
from blt.train.parameters import TABLES, settings_of
from blt_runtime.errors import CheckpointError, ConfigError, UsageError

log = logging.getLogger("blt.train")
# Sections of the configuration (or keys of a section) that must be the same in a resumed run.
SAME: dict[str, tuple[str, ...]] = {
    "kind": (),
    "model": (),
    "tokenizer": (),
    "batch": ("rows", "patches", "byte_buckets", "pack"),
    "patching": (),
    "data": ("groups",),
    "optimizer": ("name", "freeze", "lr_scale", "tables"),
    "run": ("seed", "dtype"),
}
# Of the tables' `Settings`: the missed updates of sparse tables were summed with these values. The dense optimizer may
# change them.
SAME_SPARSE = ("betas", "eps")


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


def continued(config: RunConfig, checkpoint: TrainingCheckpoint) -> RunConfig:
    """The configuration of a run that continues from `checkpoint`: its learning rate follows the curve it had.

    Hash tables of a checkpoint from before `optimizer.table_eps` keep `optimizer.eps`, unless the new setting is given.
    The curve ends where the checkpoint's did, unless `schedule.decay_steps` is given; more steps continue at its final
    rate. A WSD schedule whose decay had not begun ends at the new `schedule.steps` instead. Logs what happens to the
    rate. Raises UsageError for fewer steps than were made, and for a decay that would begin before the checkpoint.
    """
    schedule, made = config.schedule, checkpoint.step
    if schedule.steps < made:
        raise UsageError(
            f"the run has made {made:,} steps already, more than the {schedule.steps:,} asked for; nothing was "
            f"changed: give --steps {made} or more, or continue an older checkpoint with --resume"
        )
    try:
        old = ScheduleConfig.model_validate(checkpoint.state["config"]["schedule"])
        old_optimizer = _optimizer(checkpoint.state["config"])
    except (LookupError, TypeError, ValueError) as error:
        raise checkpoint.incomplete(error) from None
    config = _with_table_eps(config, checkpoint.state["config"]["optimizer"])
    if schedule.decay_steps is None and schedule.kind == old.kind:
        if schedule.kind == "wsd" and made <= old.decay_start:
            _check_decay(schedule, made)
        else:
            schedule = _ending_as(old, schedule)
            if schedule.steps not in (made, schedule.end):
                _log_end(schedule)
    before, now = (learning_rate(made, *rate) for rate in ((old_optimizer.lr, old), (config.optimizer.lr, schedule)))
    if not math.isclose(before, now) and made < schedule.steps:
        log.warning(
            "the learning rate of step %s is %.3g instead of %.3g: optimizer.lr or the schedule is not that of the "
            "checkpoint", f"{made + 1:,}", now, before,
        )  # fmt: skip
    return config.model_copy(update={"schedule": schedule})


def _optimizer(config: dict[str, Any]) -> OptimizerConfig:
    """The optimizer of a checkpoint's configuration. Before `table_eps`, tables had the eps of all parameters."""
    values = dict(config["optimizer"])
    return OptimizerConfig.model_validate({"table_eps": values["eps"], **values})


def _with_table_eps(config: RunConfig, old: dict[str, Any]) -> RunConfig:
    optimizer = config.optimizer
    if "table_eps" in old or "table_eps" in optimizer.model_fields_set:
        return config
    if getattr(config.model, "hash", None) is not None:
        log.info("the hash tables keep the eps of the checkpoint, %g", old["eps"])
    return config.model_copy(update={"optimizer": optimizer.model_copy(update={"table_eps": old["eps"]})})


def _ending_as(old: ScheduleConfig, schedule: ScheduleConfig) -> ScheduleConfig:
    """`schedule` with the end of `old` and, for WSD, its decay unless another is given."""
    changes = {} if schedule.steps == old.end else {"decay_steps": old.end}
    if schedule.kind == "wsd" and schedule.decay is None:
        changes["decay"] = old.decay_length
    return schedule.model_copy(update=changes)


def _check_decay(schedule: ScheduleConfig, made: int) -> None:
    """Raises UsageError if a WSD schedule would have begun to decay before the step `made`: the rate would jump."""
    if schedule.decay_start < made < schedule.steps:
        needed = made // (SHORT_DECAY - 1) if schedule.decay is None else schedule.decay
        raise UsageError(
            f"a decay of {schedule.decay_length:,} steps that ends at step {schedule.steps:,} begins before step "
            f"{made:,}, where the run continues: give --steps {made + needed} or more, or --set "
            f"schedule.decay={schedule.steps - made}"
        )


def _log_end(schedule: ScheduleConfig) -> None:
    """Says what the learning rate does if the run's last step is not the end of its curve."""
    first, steps = f"{schedule.end + 1:,}", f"{schedule.steps:,}"
    if schedule.kind == "wsd" and schedule.steps > schedule.end:
        log.info(
            "the decay of the run ends at step %s: steps %s to %s keep its final learning rate (--resume with a "
            "checkpoint up to step %s continues at the full rate)",
            f"{schedule.end:,}", first, steps, f"{schedule.decay_start:,}",
        )  # fmt: skip
    elif schedule.steps > schedule.end:
        log.info(
            "the schedule of the run ends at step %s: steps %s to %s keep its final learning rate "
            "(--set schedule.decay_steps=%d for a decay to step %s)",
            f"{schedule.end:,}", first, steps, schedule.steps, steps,
        )  # fmt: skip
    else:
        log.info(
            "the schedule of the run ends at step %s: it stops at step %s before its learning rate is lowest "
            "(--set schedule.decay_steps=%d for a decay to step %s)",
            f"{schedule.end:,}", steps, schedule.steps, steps,
        )  # fmt: skip


def check_same_run(checkpoint: TrainingCheckpoint, config: RunConfig, extra: dict[str, Any]) -> None:
    """Raises CheckpointError unless the checkpoint has the same configuration where it matters, and the same `extra`
    (data, patch rule, entropy model or vocabulary)."""
    try:
        _check_config(checkpoint.state["config"], config.model_dump(mode="json"))
        before, now = dict(checkpoint.state["extra"]), json.loads(json.dumps(extra))
    except (LookupError, TypeError, ValueError) as error:
        raise checkpoint.incomplete(error) from None
    if [before.pop(key, None) for key in ("first_block", "order")] != [now.pop("first_block"), now.pop("order")]:
        raise CheckpointError(
            "the checkpoint read the training text in another order (data.first_block_tokens, or an earlier version of "
            "this program); use the same, or start anew in another output folder"
        )
    if before.pop("mixture", None) != now.pop("mixture", None):
        raise CheckpointError(
            "the checkpoint read another mixture (data.mix, data.temperature or data.temperature_by); use the same, or "
            "start anew in another output folder"
        )
    if before != now:
        raise CheckpointError(
            "the checkpoint used other data, another patch rule or entropy model; "
            "use the same, or start anew in another output folder"
        )


def _check_config(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Settings that decide the weights' shapes or the next batch must agree; rates, schedule and logging may change."""
    old = {**old, "optimizer": {"name": "adamw", **old["optimizer"]}}  # of a version that had no other
    for section, keys in SAME.items():
        if section not in old and section not in new:
            continue
        for key in keys or (None,):
            before, now = (config.get(section) if key is None else config[section].get(key) for config in (old, new))
            if before != now:
                raise _differs(repr(section if key is None else f"{section}.{key}"), before, now)
    if new["optimizer"]["tables"] == "sparse":
        old_tables, new_tables = (settings_of(TABLES, _optimizer(config)) for config in (old, new))
        for key in SAME_SPARSE:
            before, now = (getattr(tables, key) for tables in (old_tables, new_tables))
            if before != now:
                raise _differs(f"{key} of the sparse hash tables", before, now)


def _differs(what: str, before: Any, now: Any) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint was made with another {what}{_values(before, now)}; "
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
