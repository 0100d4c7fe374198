"""AdamW, its schedule (spec section 11), the gradient norm, and the optimizer's state by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from blt.train.config import OptimizerConfig, ScheduleConfig
from blt.train.parallel import SINGLE, Ranks
from blt.train.parameters import parameter_groups
from blt_runtime.errors import ConfigError


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on all parameters that train, as published, unless `optimizer.groups` says otherwise.

    It is fused: one pass over the hash tables instead of six. Raises ConfigError if it has no parameter to train.
    """
    groups = parameter_groups(model, config)
    if not groups:
        raise ConfigError("optimizer.freeze leaves only the hash tables to train; use optimizer.tables: dense for that")
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def learning_rate(step: int, lr: float, schedule: ScheduleConfig) -> float:
    """The rate of step 0, 1, ...: linear up to `lr` in the warm-up, then the schedule's curve down to `min_ratio` * lr.

    From `decay_start` on, after a share s of the decay, the height over the minimum is (1 + cos(pi s)) / 2 for a cosine
    and 1 - s for WSD.
    """
    if step < schedule.warmup_steps:
        return lr * (step + 1) / schedule.warmup_steps
    done = min(1.0, max(0, step - schedule.decay_start) / max(1, schedule.decay_length))
    height = 0.5 * (1 + math.cos(math.pi * done)) if schedule.kind == "cosine" else 1 - done
    return lr * (schedule.min_ratio + (1 - schedule.min_ratio) * height)


def gradient_norm(gradients: Iterable[Tensor], rows: Sequence[Tensor] = (), owners: Ranks = SINGLE) -> Tensor:
    """The 2-norm over all gradients: whole ones, and sharded ones, whose norms are summed over ranks.

    rows: gradients of which each of `owners` has other rows.
    """
    whole: list[Tensor] = []
    shards: list[Tensor] = []
    for gradient in gradients:
        (shards if isinstance(gradient, DTensor) else whole).append(gradient)
    if owners.single:
        whole += rows
    norms = [torch.nn.utils.get_total_norm(part) for part in (whole, shards) if part]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    if rows and not owners.single:
        norms.append(owners.norm(torch.nn.utils.get_total_norm(rows)))
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def scale_gradients(gradients: Iterable[Tensor], norm: Tensor, largest: float) -> None:
    """Scales gradients in place so that their norm is at most `largest`, as torch's clip_grad_norm_ does."""
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(factor.to(local.device))


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`{parameter name}.{exp_avg, exp_avg_sq, step}`: the live tensors, created before the first step."""
    training = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter not in training:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        found |= {f"{name}.{key}": state[key].detach() for key in ("exp_avg", "exp_avg_sq", "step")}
    return found
