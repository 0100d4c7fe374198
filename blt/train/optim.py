"""AdamW and its schedule (spec section 11)."""

from __future__ import annotations

import math

import torch
from torch import nn

from blt.config import OptimizerConfig, ScheduleConfig
from blt.train.parts import parameter_groups


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on all parameters that train, as published.

    Fused: one pass over the hash tables instead of six.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(step: int, lr: float, schedule: ScheduleConfig) -> float:
    """Of step 0, 1, ...: linear up to `lr` in `warmup` steps, then a cosine down to `min_ratio` * lr at the end."""
    if step < schedule.warmup:
        return lr * (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return lr * (schedule.min_ratio + (1 - schedule.min_ratio) * cosine)
