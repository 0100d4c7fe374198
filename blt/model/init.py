"""Initial weights: a normal truncated at three sigma, sigma = fan_in^(-1/2) (spec section 11)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def truncated_normal(weight: Tensor, fan_in: int, generator: torch.Generator | None) -> None:
    std = fan_in**-0.5
    nn.init.trunc_normal_(weight, 0.0, std, -3 * std, 3 * std, generator=generator)


@torch.no_grad()
def init_weights(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Linear weights by their input width, embeddings by their own width, norms to one."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            truncated_normal(module.weight, module.in_features, generator)
        elif isinstance(module, nn.Embedding):
            truncated_normal(module.weight, module.embedding_dim, generator)
        elif (weight := getattr(module, "weight", None)) is not None:
            nn.init.ones_(weight)
