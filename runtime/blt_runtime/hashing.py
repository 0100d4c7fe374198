"""Hash n-gram ids and the table rows that they select (spec section 6), in numpy, where it is exact and cheap.

A window of g ids is hashed to Σ w[i]·q^i with w[0] the oldest, in wrapping signed 64-bit arithmetic, then
reduced with floor modulo. numpy wraps int64 sums and products as the definition requires. An ONNX graph's
ReduceSum and Pow do not.

Letters: N ids, T tables (functions x sizes, functions outer), G longest window, V rows per table, D width.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from .errors import BundleError, ConfigError
from .ids import Ids

PRIMES: Final = (
    1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899,
    9576890767, 3628273133, 2860486313, 5463458053, 3367900313,
)  # fmt: skip

Array = npt.NDArray[Any]
Tables = Array | Sequence[Array]
"""All tables of one graph in one array [T * V, D], or T arrays [V, D]."""
HashTables = Tables | Mapping[str, Tables]
"""Tables by graph ("encoder", "entropy"); an array or a list is those of the encoder."""
TableDtype = Literal["float32", "float16", "bfloat16", "int8"]
TABLE_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
}
"""How rows are stored in memory and on disk. numpy has no bfloat16: the upper half of a float32's bits, held as uint16.
int8: D codes from -127 to 127 and the four bytes of a float32 scale, little-endian, so that a row is contiguous in
the file. Such a row decodes to float32(code) * scale, rounded once to float32. Sums over tables add these values."""
SCALE_BYTES = 4
RELEASE_FROM, RELEASE_AFTER = 1 << 30, 64
"""Tables of at least so many bytes have their pages released, every so many positions. The kernel also maps the
surroundings of a row (64 KB and more where the file is cached), so a long text would end with all tables resident.
It costs 75 us per position, for rows that are mapped again; models with such tables need a thousand times that."""
_UPPER = 1 if sys.byteorder == "little" else 0


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
    """Row numbers [N, T] of ids [N] from the start of a row (positions before it count as id 0)."""
    ids_N = np.asarray(ids, dtype=np.int64)
    coefficients_TG = powers(sizes, functions)
    longest = coefficients_TG.shape[1]
    padded = np.concatenate([np.zeros(longest - 1, dtype=np.int64), ids_N])
    return hash_windows(padded, coefficients_TG, rows)


def hash_windows(padded: Ids, coefficients_TG: Ids, rows: int) -> Ids:
    """Row numbers [N, T] of ids that follow their G - 1 predecessors: padded [G - 1 + N]."""
    n_tables, longest = coefficients_TG.shape
    n = len(padded) - longest + 1
    hash_NT = np.zeros((n, n_tables), dtype=np.int64)
    for g in range(longest):
        hash_NT += padded[g : g + n, None] * coefficients_TG[:, g]
    return np.remainder(hash_NT, rows, out=hash_NT)


def stored_width(dim: int, dtype: TableDtype) -> int:
    """Elements of a stored row."""
    return dim + SCALE_BYTES if dtype == "int8" else dim


def row_bytes(dim: int, dtype: TableDtype) -> int:
    """Bytes of a stored row."""
    return stored_width(dim, dtype) * TABLE_DTYPES[dtype].itemsize


def widen(rows: Array) -> Array:
    """Decodes stored rows [..., stored width] to float32 [..., D]. uint16 is read as bfloat16."""
    if rows.dtype == np.int8:
        codes, scale = _codes_and_scale(rows)
        wide: Array = np.multiply(codes, scale, dtype=np.float32)
        return wide
    if rows.dtype != np.uint16:
        return rows.astype(np.float32)
    return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bfloat16_bits(values: Array) -> Array:
    """float32 values as bfloat16, rounded towards zero: the upper halves of their bits, uint16, as `widen` reads."""
    bits: Array = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return bits


def check_tables(tables: Tables, count: int, rows: int, dim: int, dtype: TableDtype) -> None:
    """Raises ConfigError unless `tables` are `count` tables of that shape and type, in one array or in several."""
    if not isinstance(tables, list | tuple | np.ndarray) or not all(isinstance(t, np.ndarray) for t in _pieces(tables)):
        raise ConfigError("hash tables must be one numpy array or a list of them")
    fused, pieces = isinstance(tables, np.ndarray), _pieces(tables)
    shape = (count * rows if fused else rows, stored_width(dim, dtype))
    if len(pieces) != (1 if fused else count):
        raise ConfigError(f"the model has {count} hash tables, not {len(pieces)}")
    for piece in pieces:
        if piece.shape != shape:
            raise ConfigError(f"a hash table has the shape {list(piece.shape)}, not {list(shape)}")
        if piece.dtype != TABLE_DTYPES[dtype]:
            raise ConfigError(
                f"a hash table holds {piece.dtype}, but the graph spec has {dtype} ({TABLE_DTYPES[dtype]})"
            )


def by_graph(tables: HashTables | None) -> dict[str, Tables]:
    """The tables of each graph that has some."""
    if tables is None:
        return {}
    return dict(tables) if isinstance(tables, Mapping) else {"encoder": tables}


class NGrams:
    """Hashes of the n-grams that end at a stream's newest ids, before their reduction to the rows of a table: computed
    once for all tables of the same sizes and functions. It owns scratch memory."""

    def __init__(self, sizes: Sequence[int], functions: int) -> None:
        self.coefficients_TG = powers(sizes, functions)
        self.tables, self.longest = self.coefficients_TG.shape
        self.hash_T = np.zeros(self.tables, dtype=np.int64)

    def set(self, window_G: Ids) -> None:
        """Sets `hash_T` to the hashes of the n-grams that end at the newest of the last G ids."""
        np.matmul(self.coefficients_TG, window_G, out=self.hash_T)


class HashEmbedding:
    """Sums the table rows of the newest ids: whole chunks, or one position without allocating.

    `tables` are float32, float16, uint16 (bfloat16) or int8, usually read-only memory maps of which only pages in use
    are loaded. D is at least 2. Rows are widened to float32 exactly (int8: times its scale) and added in table
    order by both forms, so they are bit-identical. One instance per stream: it owns scratch memory.

    grams: hashes that it shares with other tables of the stream (default: its own).
    """

    def __init__(
        self, tables: Tables, sizes: Sequence[int], functions: int, rows: int, grams: NGrams | None = None
    ) -> None:
        self.grams = grams or NGrams(sizes, functions)
        n_tables, self.history = self.grams.tables, self.grams.longest - 1
        self._rows = rows
        self._row_T = np.zeros(n_tables, dtype=np.int64)
        # plain views: indexing numpy's memmap class costs 2 us more
        fused, pieces = isinstance(tables, np.ndarray), [np.asarray(t) for t in _pieces(tables)]
        self._first_row_T = np.arange(n_tables, dtype=np.int64) * (rows if fused else 0)
        self._tables = pieces * n_tables if fused else pieces
        kind, width = pieces[0].dtype, pieces[0].shape[1]
        self._wide_TD = np.zeros((n_tables, width - (SCALE_BYTES if kind == np.int8 else 0)), dtype=np.float32)
        picked_TD, self._target_TD = _scratch(kind, self._wide_TD)
        self._picked_TD = picked_TD
        self._codes_and_scale = _codes_and_scale(picked_TD) if kind == np.int8 else None
        parts = [slice(None)] if fused else [slice(t, t + 1) for t in range(n_tables)]
        self._takes = [(t, self._row_T[part], picked_TD[part]) for t, part in zip(pieces, parts, strict=True)]
        self._mapping = _mapping(tables) if isinstance(tables, np.ndarray) else None
        self._releases = hasattr(mmap, "MADV_DONTNEED") and sum(piece.nbytes for piece in pieces) >= RELEASE_FROM
        self._positions = 0

    def locate(self, window_G: Ids | None) -> Ids:
        """Row of each table [T] for the newest of the last G ids, in memory that the next call overwrites.

        In one array of all tables, rows count from its start. None: the ids that `grams` hashed last.
        """
        row_T = self._row_T
        if window_G is not None:
            self.grams.set(window_G)
        np.remainder(self.grams.hash_T, self._rows, out=row_T)
        return np.add(row_T, self._first_row_T, out=row_T)

    def locate_many(self, padded: Ids) -> Ids:
        """Row of each table [N, T] for N ids that follow their G - 1 predecessors."""
        return hash_windows(padded, self.grams.coefficients_TG, self._rows) + self._first_row_T

    def one(self, window_G: Ids | None, out_D: Array) -> None:
        """Embedding of the newest of the last G ids (zeros before the start) into out_D float32. None: of the ids that
        `grams` hashed last."""
        self.locate(window_G)
        self._check_size()
        for table, row, picked in self._takes:
            # mode "raise" would copy through a buffer; the rows are in range by construction
            table.take(row, axis=0, out=picked, mode="clip")
        if self._codes_and_scale is not None:
            np.multiply(*self._codes_and_scale, out=self._wide_TD, dtype=np.float32)
        elif self._target_TD is not None:
            self._target_TD[...] = self._picked_TD
        np.add.reduce(self._wide_TD, axis=0, out=out_D)
        self._release(1)

    def many(self, padded: Ids, out_ND: Array) -> None:
        """Embeddings of N ids that follow their G - 1 predecessors, into out_ND float32."""
        row_NT = self.locate_many(padded)
        self._check_size()
        out_ND[...] = widen(self._tables[0][row_NT[:, 0]])
        for t in range(1, row_NT.shape[1]):
            out_ND += widen(self._tables[t][row_NT[:, t]])
        self._release(len(row_NT))

    def _check_size(self) -> None:
        """Raises BundleError if the mapped file was cut: reading a page that is gone would end the process. 0.4 us."""
        if self._mapping is not None and self._mapping.size() < len(self._mapping):
            raise BundleError("the file of the hash tables was cut while it was open: open the bundle again")

    def _release(self, n: int) -> None:
        """Unmaps the table pages every RELEASE_AFTER positions. They stay in the kernel's cache."""
        self._positions += n
        if self._positions >= RELEASE_AFTER and self._releases and self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)
            self._positions = 0


def _mapping(array: Array) -> mmap.mmap | None:
    """The map of the file that an array is a view of, if there is one."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


def _codes_and_scale(rows: Array) -> tuple[Array, Array]:
    """Views of int8 rows [..., D + 4]: codes [..., D] and scale [..., 1]."""
    return rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:].view("<f4")


def _pieces(tables: Tables) -> Sequence[Array]:
    return [tables] if isinstance(tables, np.ndarray) else tables


def _scratch(dtype: np.dtype[Any], wide_TD: Array) -> tuple[Array, Array | None]:
    """Where rows are gathered, and the view of `wide` to which they are then copied (None: no copy)."""
    if dtype == np.float32:
        return wide_TD, None
    if dtype == np.int8:
        return np.zeros((len(wide_TD), wide_TD.shape[1] + SCALE_BYTES), dtype=dtype), None
    picked_TD = np.zeros(wide_TD.shape, dtype=dtype)
    if dtype == np.uint16:  # the upper halves; the lower ones stay 0
        return picked_TD, wide_TD.view(np.uint16)[:, _UPPER::2]
    return picked_TD, wide_TD
