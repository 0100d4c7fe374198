"""Hash ids against the reference, exactly, and the one-position form against the vectorised one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from blt_runtime import hashing


def test_golden_hash(golden: Path) -> None:
    data = json.loads((golden / "hash.json").read_text())
    assert list(hashing.PRIMES) == data["primes"]
    assert len(data["cases"]) == 198
    for case in data["cases"]:
        functions = case["function"] + 1
        rows = hashing.hash_ids(data["tokens"], (case["group_size"],), functions, case["vocab"])
        assert rows[:, case["function"]].tolist() == case["ids"]


def test_tables_are_ordered_functions_outer() -> None:
    ids = np.random.default_rng(0).integers(0, 260, 50)
    both = hashing.hash_ids(ids, (3, 5), 2, 1000)
    assert both.shape == (50, 4)
    for f in range(2):
        for s, size in enumerate((3, 5)):
            alone = hashing.hash_ids(ids, (size,), f + 1, 1000)[:, f]
            np.testing.assert_array_equal(both[:, f * 2 + s], alone)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_position_equals_many(dtype: str) -> None:
    rng = np.random.default_rng(1)
    sizes, functions, rows = (3, 4, 8), 2, 97
    tables = rng.standard_normal((6 * rows, 16)).astype(dtype)
    ids = rng.integers(0, 260, 40)
    padded = np.concatenate([np.zeros(7, dtype=np.int64), ids])
    embedding = hashing.HashEmbedding(tables, sizes, functions, rows)
    many = np.empty((40, 16), dtype=np.float32)
    embedding.many(padded, many)
    selected = hashing.hash_ids(ids, sizes, functions, rows) + np.arange(6) * rows
    np.testing.assert_allclose(many, tables[selected].astype(np.float32).sum(axis=1), atol=1e-5)
    one = np.empty(16, dtype=np.float32)
    for t in range(40):
        embedding.one(padded[t : t + 8], one)
        np.testing.assert_allclose(one, many[t], atol=1e-5)
