"""`train`: from a configuration and a data folder to a run folder with metrics, checkpoints and model.pt."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from blt import checkpoint
from blt.checkpoint import Checkpoint
from blt.config import BLTRun, EntropyRun, RunConfig
from blt.data.dataset import Dataset, Documents
from blt.data.packing import BatchShape, Loader
from blt.data.patches import PatchIndex, choose_threshold
from blt.model import BLT, EntropyModel
from blt.train import snapshots
from blt.train.loop import Trainer
from blt.train.metrics import replace_text
from blt.train.objective import Objective, count_parameters
from blt_runtime.errors import CheckpointError, ConfigError, UsageError
from blt_runtime.patching import PatchRule

log = logging.getLogger("blt.train")
CONFIG_FILE = "config.json"
Model = TypeVar("Model", EntropyModel, BLT)
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


def prepare_run(
    config: RunConfig,
    out: Path,
    data: str | Path | None = None,
    entropy_model: str | Path | None = None,
    compile: bool | None = None,
    device: str = "cpu",
) -> tuple[Trainer, Callable[[], Checkpoint]]:
    """The trainer of a run at step 0, and what makes its final checkpoint."""
    folder = data or config.data.path
    if folder is None:
        raise ConfigError("no data: name a folder made by `blt data prepare` with --data or data.path")
    dataset = Dataset(folder)
    _check_groups(config, dataset.split("train"))
    compiled = config.run.compile if compile is None else compile
    if isinstance(config, EntropyRun):
        return _entropy_run(config, out, dataset, compiled, device)
    return _blt_run(config, out, dataset, entropy_model or config.entropy_model, compiled, device)


def _entropy_run(
    config: EntropyRun, out: Path, dataset: Dataset, compiled: bool, device: str
) -> tuple[Trainer, Callable[[], Checkpoint]]:
    model = _initial(EntropyModel(config.model), config.run.seed, device)
    objective = Objective(model, bf16=config.run.dtype == "bf16", compile=compiled, device=device)
    loaders = {name: _loader(config, dataset, name, None) for name in ("train", "valid")}
    extra = {"data": dataset.split("train").sha256}
    trainer = Trainer(config, objective, _required(loaders["train"])(), loaders["valid"], out, extra)
    return trainer, lambda: Checkpoint(None, model, None)


def _blt_run(
    config: BLTRun, out: Path, dataset: Dataset, entropy_path: str | Path | None, compiled: bool, device: str
) -> tuple[Trainer, Callable[[], Checkpoint]]:
    entropy = None
    if config.patching.scheme == "entropy":
        entropy = _frozen_entropy(entropy_path, device)
    newlines = config.patching.reset_newlines
    index = {
        name: PatchIndex(dataset, name, entropy, reset_newlines=newlines, compile=compiled)
        for name in ("train", "valid")
    }
    for part in index.values():
        part.compute()
    rule = _rule(config, dataset, index["train"])
    loaders = {name: _loader(config, dataset, name, index[name].with_rule(rule)) for name in ("train", "valid")}
    model = _initial(BLT(config.model), config.run.seed, device)
    objective = Objective(
        model, config.patching.longest_patch, bf16=config.run.dtype == "bf16", compile=compiled, device=device
    )
    extra = {"data": index["train"].documents.sha256, "patch_rule": rule.to_dict(), "entropy": index["train"].key}
    trainer = Trainer(config, objective, _required(loaders["train"])(), loaders["valid"], out, extra)
    return trainer, lambda: Checkpoint(model, entropy, rule)


def _frozen_entropy(path: str | Path | None, device: str) -> EntropyModel:
    if path is None:
        raise ConfigError("entropy patches need an entropy model: --entropy-model RUN (made by `blt train entropy`)")
    entropy = checkpoint.load(path).entropy
    if entropy is None:
        raise CheckpointError(f"{path} holds no entropy model; give the folder of a `blt train entropy` run")
    return entropy.to(device).eval().requires_grad_(False)


def _rule(config: BLTRun, dataset: Dataset, index: PatchIndex) -> PatchRule:
    patching = config.patching
    if not patching.needs_threshold:
        return patching.rule()
    members = _members(config, dataset.split("train"))
    threshold = choose_threshold(index, patching.rule(0.0), patching.target_patch_size, members)
    log.info("threshold %.6f nats for patches of %.2f bytes", threshold, patching.target_patch_size)
    return patching.rule(threshold)


def _check_groups(config: RunConfig, documents: Documents) -> None:
    for group in config.data.groups or ():
        if not len(documents.of_groups([group])):
            raise ConfigError(f"data.groups: {group!r} has no training documents; see `blt data info`")


def _members(config: RunConfig, documents: Documents) -> np.ndarray[Any, np.dtype[np.int64]]:
    groups = config.data.groups
    return np.arange(len(documents)) if groups is None else documents.of_groups(groups)


def _loader(config: RunConfig, dataset: Dataset, split: str, starts: PatchIndex | None) -> Callable[[], Loader] | None:
    """Makes loaders over one split; None if it has no documents."""
    documents = dataset.split(split)
    members = _members(config, documents)
    if not len(members):
        return None
    shape = BatchShape(config.batch.rows, config.batch.byte_buckets, config.batch.patches)
    train_split = split == "train"
    return lambda: Loader(documents, shape, starts, seed=config.run.seed, shuffle=train_split, subset=members)


def _required(make: Callable[[], Loader] | None) -> Callable[[], Loader]:
    if make is None:
        raise ConfigError("data.groups leaves no training documents; look at the data with `blt data info`")
    return make


def _initial(model: Model, seed: int, device: str) -> Model:
    model.init_weights(torch.Generator().manual_seed(seed))
    log.info("%d parameters", count_parameters(model))
    return model.to(device).train()


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
