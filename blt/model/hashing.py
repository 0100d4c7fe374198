"""Hashed n-gram embeddings (paper, section 3.2.1; spec section 6). The ids are those of `blt_runtime.hashing`.

Letters: B rows, N tokens, T tables, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blt.model.config import HashConfig
from blt.model.pages import drop_pages
from blt_runtime.hashing import PRIMES, TableDtype

_WORD = 1 << 64
_TABLE_DTYPES: dict[torch.dtype, TableDtype] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def wrap64(value: int) -> int:
    """Two's complement of a Python integer in 64 bits."""
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value


def hash_ids(ids_BN: Tensor, sizes: tuple[int, ...], functions: int, rows: int) -> Tensor:
    """Row of each table for the n-gram that ends at each token, int64 [B, N, T], T = functions x sizes.

    The hash is a polynomial of the ids, oldest id first, in wrapping 64-bit arithmetic; positions before the row have
    id 0. The powers are Python integers reduced here, because int64 `pow` and reductions are not exact on every device.
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


class MappedTables(nn.Module):
    """Tables that stay in their file, in its dtype. They are not trainable, and only rows that are read use memory.

    tables: T tensors [rows, D].  mapped: they are pages of a memory-mapped file, which may be dropped.
    """

    def __init__(self, tables: Sequence[Tensor], mapped: bool) -> None:
        super().__init__()
        self.tables, self.mapped = tuple(tables), mapped

    def __getstate__(self) -> dict[str, Any]:
        """A copy (copy.deepcopy, pickle) is in ordinary memory, whose pages must not be dropped."""
        return {**self.__dict__, "mapped": False}

    def forward(self, rows_BNT: Tensor) -> Tensor:
        """Sum of one row of each table, float32 [B, N, D]."""
        total = torch.zeros(())
        for rows_BN, table in zip(rows_BNT.unbind(-1), self.tables, strict=True):
            total = total + F.embedding(rows_BN, table).float()
            if self.mapped:  # the operating system maps up to a megabyte around each row
                drop_pages(table)
        return total


class Touched(NamedTuple):
    """The table rows that a batch reads, gathered in advance (`blt.train.tables`).

    rows: [C, D].  places: for every byte and table the index of its row in `rows`, int64 [B, N, T].
    """

    rows: Tensor
    places: Tensor


class HashEmbedding(nn.Module):
    """All tables in one weight [T * rows, D], or `MappedTables` in a loaded model.

    The table of hash function f and n-gram size s is number t = f * |sizes| + index(s) and starts at row t * rows.
    """

    offset: Tensor

    def __init__(self, config: HashConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.tables: nn.Embedding | MappedTables = nn.Embedding(config.n_tables * config.rows, dim)
        self.touched: Touched | None = None
        self.make_buffers()

    def make_buffers(self) -> None:
        """Called again after the module was built on the meta device."""
        self.register_buffer("offset", torch.arange(self.config.n_tables) * self.config.rows, persistent=False)

    @property
    def history(self) -> int:
        """Ids before a position that its n-grams read."""
        return max(self.config.sizes) - 1

    @property
    def stored_as(self) -> TableDtype:
        """float32, float16 or bfloat16."""
        return _TABLE_DTYPES[self.table(0).dtype]

    def table(self, t: int) -> Tensor:
        """[rows, D] of one table, as it is stored."""
        if isinstance(self.tables, MappedTables):
            return self.tables.tables[t]
        return self.tables.weight[t * self.config.rows : (t + 1) * self.config.rows]

    def forward(self, ids_BN: Tensor) -> Tensor:
        """Sum of one row of each table: [B, N, D]."""
        if self.touched is not None:
            rows_CD, places_BNT = self.touched
            return F.embedding_bag(places_BNT.flatten(0, 1), rows_CD, mode="sum").view(*ids_BN.shape, -1)
        c = self.config
        rows_BNT = hash_ids(ids_BN, c.sizes, c.functions, c.rows)
        if isinstance(self.tables, MappedTables):
            mapped: Tensor = self.tables(rows_BNT)
            return mapped
        rows_BNT = rows_BNT + self.offset
        return F.embedding_bag(rows_BNT.flatten(0, 1), self.tables.weight, mode="sum").view(*ids_BN.shape, -1)


def embed(byte_embedding: nn.Module, hash_embedding: HashEmbedding | None, ids_BN: Tensor) -> Tensor:
    """The sum of each byte's embedding and of those of the n-grams that end there, [B, N, D]."""
    x_BND: Tensor = byte_embedding(ids_BN)
    return x_BND if hash_embedding is None else x_BND + hash_embedding(ids_BN)
