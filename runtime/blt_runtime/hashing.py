"""Hash n-gram ids and the rows they select (spec section 6), in numpy because it is exact and cheap there.

A window of g ids is hashed to Σ w[i]·q^i with w[0] the oldest, in wrapping signed 64-bit arithmetic, then
reduced with floor modulo. numpy wraps int64 sums and products as the definition asks; an ONNX graph's
ReduceSum and Pow do not.

Letters: N ids, T tables (functions x sizes, functions outer), G longest window, V rows per table, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .ids import Ids

PRIMES: Final = (
    1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899,
    9576890767, 3628273133, 2860486313, 5463458053, 3367900313,
)  # fmt: skip

Array = npt.NDArray[Any]


def powers(sizes: Sequence[int], functions: int) -> Ids:
    """Coefficients [T, G]: row j times the last G ids (oldest first) is the hash of table j."""
    longest = max(sizes)
    powers_TG = np.zeros((functions * len(sizes), longest), dtype=np.int64)
    for f in range(functions):
        power_G = np.cumprod(np.array([1] + [PRIMES[f]] * (longest - 1), dtype=np.int64))
        for s, size in enumerate(sizes):
            powers_TG[f * len(sizes) + s, longest - size :] = power_G[:size]
    return powers_TG


def hash_ids(ids: npt.ArrayLike, sizes: Sequence[int], functions: int, rows: int) -> Ids:
    """Row numbers [N, T] of ids [N] from the start of a row (places before it count as id 0)."""
    ids_N = np.asarray(ids, dtype=np.int64)
    coefficients_TG = powers(sizes, functions)
    longest = coefficients_TG.shape[1]
    padded = np.concatenate([np.zeros(longest - 1, dtype=np.int64), ids_N])
    return hash_windows(padded, coefficients_TG, rows)


def hash_windows(padded: Ids, coefficients_TG: Ids, rows: int) -> Ids:
    """Row numbers [N, T] of ids that have their G - 1 predecessors in front: padded [G - 1 + N]."""
    n_tables, longest = coefficients_TG.shape
    n = len(padded) - longest + 1
    hash_NT = np.zeros((n, n_tables), dtype=np.int64)
    for g in range(longest):
        hash_NT += padded[g : g + n, None] * coefficients_TG[:, g]
    return np.remainder(hash_NT, rows, out=hash_NT)


class HashEmbedding:
    """Sums the table rows of the newest ids: whole chunks, or one position without allocating.

    `tables_RD` holds all tables in one array [T * V, D], usually a read-only memory map of which only the
    touched pages are ever loaded. One instance per stream: it owns scratch memory.
    """

    def __init__(self, tables_RD: Array, sizes: Sequence[int], functions: int, rows: int) -> None:
        self._tables_RD = np.asarray(tables_RD)  # a plain view: indexing numpy's memmap class costs 2 us more
        self._coefficients_TG = powers(sizes, functions)
        n_tables, self.history = self._coefficients_TG.shape
        self._rows = rows
        self._first_row_T = np.arange(n_tables, dtype=np.int64) * rows
        self._row_T = np.zeros(n_tables, dtype=np.int64)
        self._picked_TD = np.zeros((n_tables, self._tables_RD.shape[1]), dtype=self._tables_RD.dtype)

    def one(self, window_G: Ids, out_D: Array) -> None:
        """Embedding of the newest of the last G ids (zeros before the start) into out_D float32."""
        row_T = self._row_T
        np.matmul(self._coefficients_TG, window_G, out=row_T)
        np.remainder(row_T, self._rows, out=row_T)
        np.add(row_T, self._first_row_T, out=row_T)
        # mode "raise" would copy through a buffer; the rows are in range by construction
        self._tables_RD.take(row_T, axis=0, out=self._picked_TD, mode="clip")
        np.add.reduce(self._picked_TD, axis=0, dtype=np.float32, out=out_D)

    def many(self, padded: Ids, out_ND: Array) -> None:
        """Embeddings of N ids that have their G - 1 predecessors in front, into out_ND float32."""
        row_NT = hash_windows(padded, self._coefficients_TG, self._rows) + self._first_row_T
        out_ND[...] = self._tables_RD[row_NT[:, 0]]
        for t in range(1, row_NT.shape[1]):
            out_ND += self._tables_RD[row_NT[:, t]]
