"""Hashed n-gram embeddings (paper, section 3.2.1; spec section 6). The ids are those of `blt_runtime.hashing`.

Letters: B rows, N tokens, T tables, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blt.model.config import HashConfig
from blt_runtime.hashing import PRIMES

_WORD = 1 << 64


def wrap64(value: int) -> int:
    """Two's complement of a Python integer in 64 bits."""
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value


def hash_ids(ids_BN: Tensor, sizes: tuple[int, ...], functions: int, rows: int) -> Tensor:
    """Row of each table for the n-gram that ends at each token, int64 [B, N, T], T = functions x sizes.

    A polynomial of the ids, oldest id first, in wrapping 64-bit arithmetic; places before the row are id 0. The
    powers are Python integers reduced here, because int64 `pow` and reductions are not exact everywhere.
    """
    n = ids_BN.shape[1]
    padded = F.pad(ids_BN, (max(sizes) - 1, 0))
    shifted = [padded[:, max(sizes) - 1 - i : max(sizes) - 1 - i + n] for i in range(max(sizes))]
    tables = []
    for prime in PRIMES[:functions]:
        for size in sizes:
            terms = (shifted[size - 1 - i] * wrap64(prime**i) for i in range(size))
            hashed = torch.zeros_like(ids_BN)
            for term in terms:
                hashed = hashed + term
            tables.append(hashed.remainder(rows))
    return torch.stack(tables, -1)


class HashEmbedding(nn.Module):
    """All tables in one [T * rows, D] weight; table f * |sizes| + index(size) starts at row table * rows."""

    offset: Tensor

    def __init__(self, config: HashConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.tables = nn.Embedding(config.n_tables * config.rows, dim)
        self.register_buffer("offset", torch.arange(config.n_tables) * config.rows, persistent=False)

    def forward(self, ids_BN: Tensor) -> Tensor:
        """Sum of one row of each table: [B, N, D]."""
        c = self.config
        rows_BNT = hash_ids(ids_BN, c.sizes, c.functions, c.rows) + self.offset
        return F.embedding_bag(rows_BNT.flatten(0, 1), self.tables.weight, mode="sum").view(*ids_BN.shape, -1)
