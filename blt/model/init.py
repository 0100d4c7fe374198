"""Initial weights: a normal truncated at three sigma, sigma = fan_in^(-1/2) (spec section 11).

`init_weights` draws a whole model from one generator, one weight after another. `draw_rows` draws any rows of one
weight, whose values depend on the seed, the weight's name and the row alone: so runs of any number of ranks start from
the same weights, and each rank draws its own rows only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from blt.model.hashing import HashEmbedding
from blt.model.layers import RotaryTable

CUT = 3
"""In sigmas."""
BLOCK = 1 << 18
"""Numbers (at least one row) that one generator draws: a megabyte, which stays in a core's cache."""


def weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, int | None]]:
    """(name, weight, fan_in) of every weight: a product's input width, an embedding's own width, None for a norm."""
    for prefix, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            yield f"{prefix}.weight", weight, _fan_in(module)


def _fan_in(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.in_features
    return module.embedding_dim if isinstance(module, nn.Embedding) else None


def truncated_normal(weight: Tensor, fan_in: int, generator: torch.Generator | None) -> None:
    std = fan_in**-0.5
    nn.init.trunc_normal_(weight, 0.0, std, -CUT * std, CUT * std, generator=generator)


@torch.no_grad()
def init_weights(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Linear weights by their input width, embeddings by their own width, norms to one."""
    for _, weight, fan_in in weights(model):
        if fan_in is None:
            nn.init.ones_(weight)
        else:
            truncated_normal(weight, fan_in, generator)


@torch.no_grad()
def draw_rows(rows_RD: Tensor, fan_in: int, *, seed: int, name: str, first: int = 0) -> None:
    """Fills a weight's rows [first, first + R) with the initial values of the weight `name` in a run with this seed.

    Blocks of rows are drawn by generators of their own, which count (Philox; Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3"). The key is a hash of seed and name, and the counter begins at the block's number.
    """
    if not len(rows_RD):
        return
    width = rows_RD[0].numel()
    size = max(1, BLOCK // width)
    key = np.frombuffer(hashlib.sha256(f"{seed} {name}".encode()).digest()[:16], np.uint64)
    stop = first + len(rows_RD)
    for block in range(first // size, -(-stop // size)):
        begin = block * size
        values_RD = torch.from_numpy(_normal(key, block, size * width)).view(size, *rows_RD.shape[1:])
        mine = slice(max(first, begin), min(stop, begin + size))
        rows_RD[mine.start - first : mine.stop - first] = values_RD[mine.start - begin : mine.stop - begin]
    rows_RD.mul_(fan_in**-0.5)


def _normal(key: np.ndarray, block: int, n: int) -> np.ndarray:
    """Numbers of a standard normal truncated at `CUT`, float32: what is beyond it (0.3 %) is drawn again."""
    random = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, block]))
    values = random.standard_normal(n, np.float32)
    while (beyond := np.flatnonzero(np.abs(values) > CUT)).size:
        values[beyond] = random.standard_normal(beyond.size, np.float32)
    return values


def allocate(model: nn.Module, device: str | torch.device) -> None:
    """Gives a model that was built on the meta device its memory: parameters with any values, and its buffers."""
    model.to_empty(device=device)
    for module in model.modules():
        if isinstance(module, RotaryTable | HashEmbedding):
            module.make_buffers()
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(device))
