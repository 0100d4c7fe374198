"""The weights of a training checkpoint: a named one, or the newest of a run that stopped before its end.

A finished run has a `model.pt` and is read by `native`. A checkpoint (`blt.train.checkpoints`) holds the weights under
`model.*` next to the optimizer's state, and the configuration and patch rule in `state.json`. The entropy model of a
BLT is read from where the run read it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blt.checkpoint import native
from blt.checkpoint.source import Source, StoredModel, fit_weights, parse, read_json
from blt.checkpoint.tensors import StoredTensor, read_shards
from blt.model import BLTConfig, EntropyConfig
from blt_runtime.errors import BltError, CheckpointError
from blt_runtime.patching import PatchRule

CHECKPOINTS, STATE, MANIFEST, WEIGHTS = "checkpoints", "state.json", "manifest.json", "shard-*.safetensors"
EMA = "ema."
"""Prefix of the names of averaged weights, which a run may leave out."""
FINISH = "the same `blt train` command continues it"
log = logging.getLogger("blt.checkpoint")


def matches(path: Path) -> bool:
    """A training checkpoint, or the folder of a run without a model.pt, which `native` matches."""
    return ((path / CHECKPOINTS).is_dir() or _is_checkpoint(path)) and not native.matches(path)


def _is_checkpoint(path: Path) -> bool:
    return (path / MANIFEST).is_file() and (path / STATE).is_file()


def read(path: Path) -> Source:
    """Raises CheckpointError."""
    named = _is_checkpoint(path)
    folder = _whole(path) if named else _newest(path)
    state = read_json(folder / STATE)
    try:
        kind, config, extra = state["config"]["kind"], state["config"], state["extra"]
        steps, planned = int(state["step"]), int(config["schedule"]["steps"])
    except (LookupError, TypeError, ValueError):
        raise CheckpointError(f"{folder / STATE} is damaged; {FINISH} from an older checkpoint") from None
    if kind == "bpe":
        if named:
            raise CheckpointError(
                f"{path} holds a token model: `blt train` with --resume {path} --steps {steps} and another -o writes "
                "its model"
            )
        raise CheckpointError(
            f"{path} stopped at step {steps:,} of {planned:,} and holds a token model without a model.pt: {FINISH}, "
            f"and with --steps {steps} it only writes the model.pt"
        )
    if not named:
        log.info("%s stopped at step %s of %s; this is the model of that step", path, f"{steps:,}", f"{planned:,}")
    names = _weights(read_shards(sorted(folder.glob(WEIGHTS))))
    if kind == "entropy":
        return Source("stopped run", path, entropy=_model(EntropyConfig, config, names, folder)).check_vocabularies()
    return Source(
        "stopped run",
        path,
        blt=_model(BLTConfig, config, names, folder),
        patch_rule=_rule(extra, folder),
        entropy_path=config.get("entropy_model"),
    ).check_vocabularies()


def _weights(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The weights by name with the prefix `model.`: averages (`optimizer.ema`) where the checkpoint has them, as in
    model.pt."""
    found = {name: tensor for name, tensor in stored.items() if name.startswith("model.")}
    averaged = {name for name in found if f"{EMA}{name[6:]}" in stored}
    if averaged:
        log.info("the weights are the averages of `optimizer.ema`")
    return found | {name: stored[f"{EMA}{name[6:]}"] for name in averaged}


def _whole(folder: Path) -> Path:
    if not _is_whole(folder):
        raise CheckpointError(f"{folder} is damaged: files are missing or do not have the sizes of its {MANIFEST}")
    return folder


def _newest(path: Path) -> Path:
    """The newest checkpoint whose files are there with the sizes of its manifest. Raises CheckpointError."""
    found = sorted(
        (p for p in (path / CHECKPOINTS).glob("step-*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:])
    )
    for folder in reversed(found):
        if _is_whole(folder):
            return folder
        log.warning("%s is damaged; trying the previous one", folder)
    what = "no undamaged checkpoint" if found else "no checkpoint: it stopped before its first one"
    raise CheckpointError(f"{path} is a training run with {what}; {FINISH}")


def _is_whole(folder: Path) -> bool:
    try:
        files = read_json(folder / MANIFEST)["files"]
        return all((folder / Path(name).name).stat().st_size == entry["size"] for name, entry in files.items())
    except (CheckpointError, OSError, LookupError, TypeError, AttributeError):
        return False


def _model(kind: Any, config: dict[str, Any], tensors: dict[str, StoredTensor], folder: Path) -> StoredModel[Any]:
    parsed = parse(kind, config.get("model"), str(folder / STATE), "config.model")
    return fit_weights(parsed, tensors, lambda name: [f"model.{name}"], where=folder)


def _rule(extra: Any, folder: Path) -> PatchRule:
    try:
        return PatchRule.from_dict(extra["patch_rule"])
    except (BltError, LookupError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE}: {error}") from None
