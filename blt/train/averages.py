"""The exponential moving average (EMA) of the weights: `optimizer.ema`.

Validation, samples and the final model use the averages; training goes on with the weights. Several ranks keep the
averages of their shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from blt.model.shards import local
from blt.train import parallel

WARMUP = 9
"""The n-th update keeps at most n / (n + WARMUP) of the averages, so that the initial weights are soon forgotten."""


class Averages:
    """average = d * average + (1 - d) * weight after every step, float32, of all parameters that train.

    d is `decay`, or n / (n + 9) in the n-th update if that is smaller (TensorFlow's `ExponentialMovingAverage`: (1 + t)
    / (10 + t) after t steps). `updates` counts steps; those that were skipped changed no weight and do not count.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay, self.updates = model, decay, 0
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The averages by name, made at their first use: whole ones never exist if the model is sharded before."""
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    @contextmanager
    def following(self) -> Iterator[None]:
        """Adds the weights after the update inside. The averages begin with the weights before the first one."""
        averages = list(self.tensors.values())
        yield
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + WARMUP))
        weights = [local(weight.detach()) for weight in self.weights.values()]
        get_ema_multi_avg_fn(decay)([local(average) for average in averages], weights, None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averages while inside. Every rank calls it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def apply(self) -> None:
        """The model gets the averages for good, and the averages the weights. Every rank calls it."""
        self._swap()

    def resume(self, updates: int | None) -> None:
        """Continues after so many updates, with the tensors that were filled in place; None: begins with the weights as
        they are now."""
        self.updates = updates or 0
        if updates is None:
            self.__dict__.pop("tensors", None)

    @torch.no_grad()
    def _swap(self) -> None:
        parallel.reshard(self.model)  # a forward pass without a backward pass leaves gathered copies of the weights
        for name, average in self.tensors.items():
            a, w = local(average), local(self.weights[name].detach())
            kept = w.clone()
            w.copy_(a)
            a.copy_(kept)
