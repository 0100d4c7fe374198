"""AdamW or Muon, their schedule (spec section 11), the gradient norm, and the optimizer's state by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from blt.model.shards import local
from blt.train.config import OptimizerConfig, ScheduleConfig
from blt.train.parallel import SINGLE, Ranks
from blt.train.parameters import is_hidden_matrix, parameter_groups
from blt_runtime.errors import ConfigError


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on all parameters that train, as published, unless `optimizer.groups` says otherwise; or
    Muon for the matrices and AdamW for the others.

    AdamW is fused: one pass over the hash tables instead of six. Raises ConfigError if it has no parameter to train.
    """
    groups = parameter_groups(model, config)
    if not groups:
        raise ConfigError("optimizer.freeze leaves only the hash tables to train; use optimizer.tables: dense for that")
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=True)
    matrices = parameter_groups(model, config, is_hidden_matrix)
    if not matrices:
        raise ConfigError("optimizer.name is muon, but no matrix of a block trains; use adamw")
    others = parameter_groups(model, config, lambda name, parameter: not is_hidden_matrix(name, parameter))
    return MuonAndAdamW(matrices, others, config.lr)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices and AdamW for other parameters, in one list of groups and one state.

    Muon's update is the momentum with its singular values replaced by numbers near 1. Its rate is scaled such that the
    update's root mean square is about that of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", section
    2.2), so one schedule serves both. Betas and eps of a group are AdamW's and have no meaning for a matrix.
    """

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], lr: float) -> None:
        kept = ("params", "scale", "weight_decay")
        muon_groups = [{key: group[key] for key in kept} for group in matrices]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.Muon(muon_groups, lr=lr, adjust_lr_fn="match_rms_adamw")]
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, fused=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Both optimizers' step."""
        for part in self.parts:
            part.step()


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
        part = local(gradient)
        part.mul_(factor.to(part.device))


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`{parameter name}.{exp_avg, exp_avg_sq, step}`, of Muon `.momentum_buffer`: the live tensors, created before the
    first step."""
    keys = {parameter: _state_keys(group) for group in optimizer.param_groups for parameter in group["params"]}
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter not in keys:
            continue
        state = optimizer.state[parameter]
        if not state:
            state |= {key: torch.zeros_like(parameter) for key in keys[parameter]}
            if "step" in state:
                state["step"] = torch.zeros((), device=parameter.device)
        found |= {f"{name}.{key}": state[key].detach() for key in keys[parameter]}
    return found


def _state_keys(group: dict[str, Any]) -> tuple[str, ...]:
    return ("momentum_buffer",) if "momentum" in group else ("exp_avg", "exp_avg_sq", "step")
