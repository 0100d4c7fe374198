"""What a run needs to go on as if nobody had stopped it, to and from a snapshot.

Tensors (weights, optimizer state, random state) are stored by name and cut among any number of ranks; everything else
is plain values: step, the loader's three integers, sums of the unfinished log line, the configuration.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blt.train import snapshots
from blt.train.optim import optimizer_state
from blt.train.snapshots import Snapshot
from blt_runtime.errors import CheckpointError

if TYPE_CHECKING:
    from blt.train.loop import Trainer

# Sections of the configuration (or keys of one) that a resumed run shares with the checkpoint.
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
# What a row of sparse tables has missed was summed up with these; the dense optimizer may change them.
SAME_SPARSE = SAME | {"optimizer": (*SAME["optimizer"], "betas", "eps")}


def save(trainer: Trainer) -> None:
    """Writes the snapshot of this step. Every rank calls it. Raises CheckpointError, with older ones intact."""
    state = {
        "config": trainer.config.model_dump(mode="json"),
        "loader": trainer.loader.state(),
        "bytes": trainer.bytes,
        "skips": trainer.skips,
        "last": [trainer.lr, trainer.norm],
        "table_steps": None if trainer.tables is None else trainer.tables.missed.steps,
        "window": trainer.window.state(),
        "extra": trainer.extra,
    }
    keep = trainer.config.run.keep_checkpoints
    snapshots.write(trainer.folder, trainer.step, _tensors(trainer), state, keep, trainer.ranks)


def restore(trainer: Trainer, snapshot: Snapshot) -> None:
    """Goes on from a snapshot. Raises CheckpointError if its model, data or batches are others."""
    state = snapshot.state
    try:
        _same_run(state["config"], trainer.config.model_dump(mode="json"))
        if state["extra"] != json.loads(json.dumps(trainer.extra)):
            raise CheckpointError(
                "the checkpoint used other data, another patch rule or entropy model; "
                "use the same, or start anew in another output folder"
            )
        if trainer.tables is not None:
            trainer.tables.make_room(state["table_steps"])
        tensors = _tensors(trainer)
        snapshot.load(tensors, trainer.ranks)
        torch.set_rng_state(tensors["rng"])
        trainer.loader.restore(state["loader"])
        trainer.step, trainer.bytes = snapshot.step, state["bytes"]
        trainer.skips = int(state["skips"])
        trainer.lr, trainer.norm = state["last"]
        trainer.window.restore(state["window"])
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{snapshot.path}: {snapshots.STATE} is incomplete ({error!r})") from None


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    """The run's own tensors by name, so that what is loaded into them is in place."""
    model = trainer.objective.model
    found = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    state = optimizer_state(model, trainer.optimizer) | ({} if trainer.tables is None else trainer.tables.tensors())
    found |= {f"optimizer.{name}": tensor for name, tensor in state.items()}
    return found | {"rng": torch.get_rng_state()}


def _same_run(old: dict[str, Any], new: dict[str, Any]) -> None:
    """What decides the weights' shapes and the next batch must agree; rates, schedule and logging may change."""
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
