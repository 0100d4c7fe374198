"""Norms of the parts of a model at some steps (`run.norms_every`): gradients, weights, and updates over weights.

They say which part of a model moves too fast or not at all. A step that is measured waits for the device once more and
keeps a copy of the weights until its update is made; other steps do and keep nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from blt.train.optim import gradient_norm as norm_of
from blt.train.parameters import TABLES

OUTPUT = ("output.", "decoder.output.")
"""Parameters of the projection to logits."""
STAGES = ("encoder", "latent", "decoder")
KINDS = ("gradient_norm", "weight_norm", "update_ratio")
Record = dict[str, dict[str, float]]


class PartNorms:
    """whole: the name of what is no stage of a BLT, such as `entropy model`.  every: steps, 0 for never."""

    def __init__(self, model: nn.Module, whole: str, every: int):
        self.model, self.whole, self.every = model, whole, every
        self._record: Record = {}

    def part_of(self, name: str) -> str:
        """`encoder`, `latent`, `decoder`, `tables`, `output`, or the whole model."""
        if name == TABLES:
            return "tables"
        if name.startswith(OUTPUT):
            return "output"
        stage = name.partition(".")[0]
        return stage if stage in STAGES else self.whole

    @contextmanager
    def measured(self, step: int) -> Iterator[None]:
        """Measures the update inside if `step` is due. Gradients are those before it, before clipping. Every rank calls
        it."""
        if not self.every or step % self.every:
            yield
            return
        parts = self._parts()
        gradients = {part: norm_of([p.grad for p in members if p.grad is not None]) for part, members in parts.items()}
        before = {part: [p.detach().clone() for p in members] for part, members in parts.items()}
        yield
        updates, weights = {}, {}
        for part, members in parts.items():
            weights[part] = norm_of(before[part])
            updates[part] = norm_of([p.detach() - old for p, old in zip(members, before[part], strict=True)])
        kinds = gradients, weights, {part: updates[part] / weights[part].clamp(min=1e-30) for part in parts}
        values = torch.stack([kind[part].float() for kind in kinds for part in parts]).tolist()
        rows = [values[i : i + len(parts)] for i in range(0, len(values), len(parts))]
        self._record = {kind: dict(zip(parts, row, strict=True)) for kind, row in zip(KINDS, rows, strict=True)}

    def take(self) -> Record:
        """The norms of the step that was just measured, once; empty if it was not due or changed nothing.

        gradient_norm: before clipping.  weight_norm: before the update.  update_ratio: the update's norm over it.
        """
        record, self._record = self._record, {}
        return record

    def _parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters with gradients, by part."""
        found: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                found.setdefault(self.part_of(name), []).append(parameter)
        return found
