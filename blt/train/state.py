"""`TrainState`: everything that changes while a run trains, and what a checkpoint must hold to continue it bit for bit.

A state dict has two parts. `tensors` are weights, their averages, optimizer state and random state by name; they may
be sharded over any number of ranks. `values` are plain values for JSON: the loader's position, the counters and the
open log line.
Not here: the files (`blt.train.checkpoints`), and whether a checkpoint fits the run (`blt.train.resume`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blt.checkpoint.stopped import EMA
from blt.data.packing import Loader
from blt.train.averages import Averages
from blt.train.metrics import MetricWindow
from blt.train.optim import optimizer_state
from blt.train.spikes import Spikes
from blt.train.tables import SparseTables

Tensors = dict[str, Tensor]


class StateDict(NamedTuple):
    """`tensors`: the live tensors, not copies.  `values`: plain values for JSON."""

    tensors: Tensors
    values: dict[str, Any]


@dataclass
class TrainState:
    """`step` counts optimizer steps, skipped ones included; `bytes` are the bytes trained on; `skips` are the steps
    skipped in a row; `lr` and `norm` are those of the last step taken; `window` sums what the next log line reports."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    tables: SparseTables | None
    loader: Loader
    window: MetricWindow = field(default_factory=MetricWindow)
    step: int = 0
    bytes: int = 0
    skips: int = 0
    lr: float = 0.0
    norm: float = 0.0
    averages: Averages | None = None
    spikes: Spikes = field(default_factory=Spikes)

    def state_dict(self) -> StateDict:
        """The state after the last step."""
        values = {
            "step": self.step,
            "loader": self.loader.state(),
            "bytes": self.bytes,
            "skips": self.skips,
            "last": [self.lr, self.norm],
            "table_steps": None if self.tables is None else self.tables.missed.steps,
            "window": self.window.state(),
            "spikes": self.spikes.state(),
            "ema_updates": None if self.averages is None else self.averages.updates,
        }
        return StateDict(self._tensors(), values)

    def load_state_dict(self, values: dict[str, Any], load_tensors: Callable[[Tensors], None]) -> None:
        """Continues from the `values` of a state dict; `load_tensors` fills the live tensors in place.

        Averages that the state dict lacks begin with its weights.
        Raises LookupError, TypeError or ValueError if `values` is incomplete, and what `load_tensors` raises.
        """
        if self.tables is not None:
            self.tables.resize_history(values["table_steps"])
        averages, updates = self.averages, values.get("ema_updates")
        tensors = self._tensors(averages=updates is not None)
        load_tensors(tensors)
        if averages is not None:
            averages.resume(updates)
        torch.set_rng_state(tensors["rng"])
        self.loader.restore(values["loader"])
        self.step, self.bytes, self.skips = values["step"], values["bytes"], int(values["skips"])
        self.lr, self.norm = values["last"]
        self.window.restore(values["window"])
        self.spikes.restore(values.get("spikes", {}))

    def _tensors(self, averages: bool = True) -> Tensors:
        # The model first: its state_dict reshards FSDP's parameters, and only those are the optimizer's.
        found = {f"model.{name}": tensor.detach() for name, tensor in self.model.state_dict().items()}
        optimizer = optimizer_state(self.model, self.optimizer)
        if self.tables is not None:
            optimizer |= self.tables.tensors()
        found |= {f"optimizer.{name}": tensor for name, tensor in optimizer.items()}
        if averages and self.averages is not None:
            found |= {f"{EMA}{name}": tensor for name, tensor in self.averages.tensors.items()}
        return found | {"rng": torch.get_rng_state()}
