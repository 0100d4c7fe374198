"""A module that is one cached attention with its norm and rotation, and specs of its graph for each kind of cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blt.model import ops
from blt_runtime.bundle.spec import CacheKind, CacheSpec, GraphSpec, TensorSpec

HEADS, GROUPS, SIZE, WINDOW, ROWS = 4, 2, 8, 16, 512


class Attend(nn.Module):
    """x [B, S, heads + 2 groups, K] -> attention output, caches: norm, rotation, attention, nothing else."""

    def __init__(self, window: int, size: int) -> None:
        super().__init__()
        self.window, self.weight = window, nn.Parameter(torch.linspace(0.5, 1.5, size))
        angle = torch.arange(ROWS)[:, None] * torch.logspace(0, -2, size // 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(
        self, x: Tensor, positions: Tensor, doc_start: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, ...]:
        q, k, v = ops.rms_norm(x, self.weight, 1e-5).transpose(1, 2).split([HEADS, GROUPS, GROUPS], 1)
        cos, sin = self.get_buffer("cos")[positions], self.get_buffer("sin")[positions]
        q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
        return ops.cached_attention(q, k, v, key, value, positions, doc_start, self.window)


def spec_of(kind: CacheKind, capacity: int, window: int, size: int) -> GraphSpec:
    cache_shape = ("B", GROUPS, capacity, size)
    return GraphSpec(
        "attend",
        (TensorSpec("x", "float32", ("B", "S", HEADS + 2 * GROUPS, size)), TensorSpec("positions", "int64", ("B", "S")),
         TensorSpec("doc_start", "int64", ("B", "S")), TensorSpec("past_key.0", "float32", cache_shape),
         TensorSpec("past_value.0", "float32", cache_shape)),
        (TensorSpec("out", "float32", ("B", HEADS, "S", size)), TensorSpec("present_key.0", "float32", cache_shape),
         TensorSpec("present_value.0", "float32", cache_shape)),
        {"present_key.0": "past_key.0", "present_value.0": "past_value.0"},
        CacheSpec(kind, capacity, window or None, 1),
    )  # fmt: skip


RING = spec_of("ring", 64, WINDOW, SIZE)
EVICTING = spec_of("window", 24, WINDOW, SIZE)
LINEAR = spec_of("linear", 320, 0, SIZE)
LINEAR_WINDOW = spec_of("linear", 320, WINDOW, SIZE)
