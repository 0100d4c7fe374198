"""`train`: from a configuration and a data folder to a run folder with metrics, checkpoints and model.pt."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from blt.checkpoint import native
from blt.checkpoint.models import Checkpoint
from blt.checkpoint.native import MODEL_FILE
from blt.data.quantities import amount
from blt.files import replace_text
from blt.train import checkpoints, parallel
from blt.train.config import KINDS, BLTRun, RunConfig
from blt.train.loop import Trainer
from blt.train.profile import FOLDER as PROFILES
from blt.train.profile import StepProfile
from blt.train.resume import continued, find_checkpoint
from blt.train.setup import prepare_run
from blt_runtime import reading
from blt_runtime.errors import BltError, ConfigError, UsageError

log = logging.getLogger("blt.train")
CONFIG_FILE = "config.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Interrupted(BltError):
    """Ctrl-C before the first step."""

    exit_code = 128 + signal.SIGINT


def train(
    config: RunConfig,
    out: str | Path,
    *,
    data: str | Path | None = None,
    entropy_model: str | Path | None = None,
    boundaries: str | Path | None = None,
    resume: str = "auto",
    force: bool = False,
    compile: bool | None = None,
    device: str = "cpu",
    profile: tuple[int, int] | None = None,
) -> Path:
    """Trains and returns the path of `model.pt`.

    data, entropy_model: replace the configuration's.  boundaries: a folder of stored patch boundaries.  resume: "auto"
    (the newest checkpoint in `out`, if any), "none", or the path of a checkpoint or run. The last two are refused if
    `out` has checkpoints, unless the path is one of them.  force: train into a folder that holds other files.
    profile: the first and last step, counted from 1, of which a trace and a table are made.

    Under torchrun every process calls it. Parameters are sharded, and the first rank writes logs, metrics and model.pt.
    Raises UsageError, InputError, ConfigError, CheckpointError, and Terminated after SIGTERM with everything saved.
    """
    out = Path(out)
    _check_target(out, force)
    if config.run.deterministic:  # read by cuBLAS at its first product; torch refuses products on CUDA without it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with ExitStack() as stack:
        ranks, device = stack.enter_context(parallel.processes(device))
        stack.enter_context(_quiet_unless(ranks.first))
        if not ranks.single and config.run.attention == "flex":
            raise ConfigError(
                "run.attention: flex trains in a single process; with several ranks leave run.attention at auto"
            )
        parallel.ranks_of_a_group(config.run.shard_ranks, ranks.world)
        ranks.on_first(lambda: stack.enter_context(only_trainer(out)))
        checkpoint = ranks.on_first(lambda: find_checkpoint(out, out / checkpoints.FOLDER, resume))
        if checkpoint is None:
            _log_warmup(config)
        else:
            config = continued(config, checkpoint)
        config = _with_entropy_path(config, entropy_model)
        with _interruptible():
            trainer, finish = prepare_run(
                config,
                out,
                data=data,
                entropy_model=entropy_model,
                boundaries=boundaries,
                compile=compile,
                device=device,
                ranks=ranks,
                resumes=checkpoint is not None,
            )
        if resume != "auto":
            trainer.advice = "run the same command without --resume to continue"
        if checkpoint is not None:
            trainer.restore(checkpoint)
            _log_resumed(trainer, config.schedule.steps)
        if profile is not None and ranks.first:
            trainer.profile = _profile(profile, trainer)
        ranks.on_first(lambda: _begin(trainer))
        trainer.run(config.schedule.steps)
        trainer.finish()
        _end(trainer, finish)
    return out / MODEL_FILE


def _with_entropy_path(config: RunConfig, entropy_model: str | Path | None) -> RunConfig:
    """The configuration with the place of its entropy model, for the commands that read a stopped run."""
    if not isinstance(config, BLTRun) or (path := entropy_model or config.entropy_model) is None:
        return config
    where = str(Path(path).resolve() if Path(path).exists() else path)
    return config.model_copy(update={"entropy_model": where})


def _profile(steps: tuple[int, int], trainer: Trainer) -> StepProfile:
    """Raises UsageError unless the run still makes these steps."""
    (first, last), made, planned = steps, trainer.state.step, trainer.config.schedule.steps
    if not made < first <= last <= planned:
        raise UsageError(f"--profile {first}:{last}: this run makes the steps {made + 1} to {planned}; profile those")
    return StepProfile(first, last, trainer.out / PROFILES)


def _log_resumed(trainer: Trainer, steps: int) -> None:
    made = trainer.state.step
    if made < steps:
        log.info("resumed at step %s of %s", f"{made:,}", f"{steps:,}")
    else:
        log.info("the run is finished: all %s steps are made (--steps N with a larger N continues it)", f"{steps:,}")


@contextmanager
def _interruptible() -> Iterator[None]:
    """Says what Ctrl-C costs before the first step."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted before the first step; what was computed of the data is kept: run the same command to continue"
        ) from None


def _log_warmup(config: RunConfig) -> None:
    schedule = config.schedule
    if schedule.warmup_steps != schedule.warmup:
        log.info(
            "the warm-up of %s steps is longer than the run of %s; shortened to %s",
            f"{schedule.warmup:,}", f"{schedule.end:,}", f"{schedule.warmup_steps:,}",
        )  # fmt: skip


@contextmanager
def only_trainer(out: Path) -> Iterator[None]:
    """The folder of a run, made if it is missing, locked against other trainers while inside.

    The system releases the lock if the process dies. A folder that was made here is removed if it stays empty. Raises
    UsageError if another process trains there or the folder cannot be made.
    """
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}; choose another folder for the run") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise UsageError(
            f"another process is training in {out}; wait until it ends or stop it, or choose another folder with -o"
        ) from None
    except OSError as error:  # a file system without locks on folders
        log.debug("%s cannot be locked (%s)", out, error.strerror)
    try:
        yield
    finally:
        os.close(folder)
        if made:
            with suppress(OSError):  # it holds something
                out.rmdir()


def _begin(trainer: Trainer) -> None:
    trainer.out.mkdir(parents=True, exist_ok=True)
    settings = trainer.config.model_dump(mode="json")
    replace_text(trainer.out / CONFIG_FILE, json.dumps(settings, indent=1) + "\n")
    trainer.metrics.cut(trainer.state.step)
    checkpoints.set_aside(trainer.folder, trainer.state.step)


def _end(trainer: Trainer, finish: Callable[[], Checkpoint]) -> None:
    """Writes model.pt on the first rank. With several ranks the weights pass through files, so none holds the whole."""
    path, ranks, dtype = trainer.out / MODEL_FILE, trainer.ranks, DTYPES[trainer.config.run.save_dtype]
    if ranks.single:
        native.write(finish().to_source(path), path, dtype)
    else:
        with checkpoints.gathered(path, trainer.objective.model.state_dict(), ranks) as whole:
            ranks.on_first(lambda: native.write(finish().to_source(path).with_weights(whole), path, dtype))
    weights = "" if trainer.state.averages is None else " of averaged weights (optimizer.ema)"
    log.info("wrote the model%s, %s", weights, amount(path.stat().st_size))


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
