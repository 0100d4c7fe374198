"""Hash ids equal those of facebookresearch/blt, and the one-position form equals the vectorised one."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest

from blt_runtime import Model, hashing
from blt_runtime.backends.null import NullBackend, null_spec
from blt_runtime.bundle.spec import HashSpec
from blt_runtime.errors import ConfigError
from blt_runtime.hashing import TableDtype
from tests.runtime.bundles import write_bundle


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


def random_tables(dtype: TableDtype, count: int, rows: int, dim: int) -> np.ndarray:
    """[count * rows, dim] in the stored type, of very different sizes so that the order of a sum shows."""
    rng = np.random.default_rng(1)
    values = rng.standard_normal((count * rows, dim)) * 10.0 ** rng.uniform(-3, 3, (count * rows, 1))
    if dtype == "int8":
        scale = np.abs(values).max(1, keepdims=True).astype("<f4") / np.float32(127)
        return np.concatenate([np.rint(values / scale).astype(np.int8), scale.view(np.int8)], 1)
    if dtype == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype)


def exact(stored: np.ndarray) -> np.ndarray:
    """Each element through a Python float, bfloat16 from its sign, exponent and fraction, int8 from code and scale: a
    Python float holds their product, so that there is one rounding."""
    if stored.dtype == np.int8:
        rows = [(row[:-4], struct.unpack("<f", row[-4:].tobytes())[0]) for row in stored]
        return np.array([[float(code) * scale for code in codes] for codes, scale in rows], np.float32)
    if stored.dtype != np.uint16:
        return np.array([float(v) for v in stored.flat], np.float32).reshape(stored.shape)
    values = [
        (-1.0) ** (v >> 15) * math.ldexp((v & 127) + 128 * (v >> 7 & 255 > 0), max(v >> 7 & 255, 1) - 134)
        for v in stored.flatten().tolist()
    ]
    return np.array(values, np.float32).reshape(stored.shape)


def in_table_order(rows_TD: np.ndarray) -> np.ndarray:
    total: np.ndarray = rows_TD[0].copy()
    for row in rows_TD[1:]:
        total = total + row
    return total


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("dim", "functions"), [(2, 11), (7, 2), (16, 2), (1024, 1)])
def test_one_position_equals_many_to_the_last_bit(dtype: TableDtype, apart: bool, dim: int, functions: int) -> None:
    sizes, rows = (3, 4, 8), 97
    count = 3 * functions
    stored = random_tables(dtype, count, rows, dim)
    ids = np.random.default_rng(2).integers(0, 260, 40)
    tables = list(stored.reshape(count, rows, -1)) if apart else stored
    embedding = hashing.HashEmbedding(tables, sizes, functions, rows)
    padded = np.concatenate([np.zeros(7, dtype=np.int64), ids])
    many, one = np.empty((40, dim), np.float32), np.empty(dim, np.float32)
    embedding.many(padded, many)
    selected_NT = hashing.hash_ids(ids, sizes, functions, rows) + np.arange(count) * rows
    for t in range(40):
        expected = in_table_order(exact(stored[selected_NT[t]]))
        embedding.one(padded[t : t + 8], one)
        np.testing.assert_array_equal(one, expected)
        np.testing.assert_array_equal(many[t], expected)


def test_tables_of_other_rows_share_the_hashes_of_a_position() -> None:
    sizes, functions, random = (2, 5), 2, np.random.default_rng(6)
    grams = hashing.NGrams(sizes, functions)
    shared, own = list[hashing.HashEmbedding](), list[hashing.HashEmbedding]()
    for rows, dim in ((31, 6), (97, 4)):
        tables = random.normal(size=(4 * rows, dim)).astype(np.float32)
        shared.append(hashing.HashEmbedding(tables, sizes, functions, rows, grams))
        own.append(hashing.HashEmbedding(tables, sizes, functions, rows))
    for window_G in random.integers(0, 260, (20, 5)):
        found, wanted = ([np.empty(6, np.float32), np.empty(4, np.float32)] for _ in range(2))
        shared[0].one(window_G, found[0])
        shared[1].one(None, found[1])
        for embedding, out_D in zip(own, wanted, strict=True):
            embedding.one(window_G, out_D)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("given", [None, ["encoder"], ["entropy"], ["encoder", "entropy", "decoder"]])
def test_tables_are_given_for_the_graphs_that_have_a_hash(given: list[str] | None) -> None:
    spec = null_spec(hash=HashSpec((3, 4), 1, 97, 4), entropy_hash=HashSpec((3,), 1, 5, 4))
    tables = None if given is None else {name: np.zeros((194, 4), np.float32) for name in given}
    with pytest.raises(ConfigError, match="exactly when the spec has a hash, by the names of its graphs"):
        Model(spec, NullBackend(spec), tables)


def test_bfloat16_is_widened_exactly() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    finite = every[(every >> 7 & 255) < 255]
    np.testing.assert_array_equal(hashing.widen(finite), exact(finite))
    assert hashing.widen(np.array([0x7F80, 0xFF80], np.uint16)).tolist() == [np.inf, -np.inf]
    assert np.isnan(hashing.widen(np.array([0x7FC0], np.uint16))).all()


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (np.zeros((194, 4), np.float16), "holds float16, but the graph spec has bfloat16"),
        (np.zeros((97, 4), np.uint16), r"shape \[97, 4\], not \[194, 4\]"),
        ([np.zeros((97, 4), np.uint16)] * 3, "2 hash tables, not 3"),
        ([np.zeros((97, 4), np.uint16), np.zeros((97, 5), np.uint16)], r"\[97, 5\], not \[97, 4\]"),
        ([np.zeros((97, 4), np.uint16), np.zeros((97, 4), np.int16)], "holds int16"),
    ],
)
def test_a_model_refuses_tables_that_do_not_fit(tables: hashing.Tables, message: str) -> None:
    spec = null_spec(hash=HashSpec((3, 4), 1, 97, 4, "bfloat16"))
    with pytest.raises(ConfigError, match=message):
        Model(spec, NullBackend(spec), tables)


def test_a_model_takes_tables_apart() -> None:
    spec = null_spec(hash=HashSpec((3, 4), 1, 97, 4))
    tables = np.random.default_rng(0).integers(0, 9, (194, 4)).astype(np.float32)
    ids = np.random.default_rng(1).integers(0, 260, 50)
    fused, apart = (Model(spec, NullBackend(spec), t).score(ids) for t in (tables, [tables[:97], tables[97:]]))
    np.testing.assert_array_equal(fused.logits, apart.logits)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="resident pages of a mapping: Linux only")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_table_stays_out_of_memory_but_for_the_rows_read(tmp_path: Path, dtype: TableDtype) -> None:
    """A 256 MB table without a byte on disk (a sparse file); 100 bytes read 600 rows of one or two pages."""
    hash = HashSpec(
        (3, 4, 5, 6, 7, 8), 1, (256 << 20) // (6 * 1024 * hashing.TABLE_DTYPES[dtype].itemsize), 1024, dtype
    )
    write_bundle(tmp_path / "b", null_spec(hash=hash), empty_tables=True)
    model = Model.open(tmp_path / "b", backend="null", verify="sizes")
    assert resident("hash_tables.npy") < 1 << 20
    stream = model.stream()
    stream.append(bytes(range(60)))
    read = len(list(stream.generate_ids(40, temperature=0, stop_at_eos=False)))
    assert read == 40
    page, row = 4096, 1024 * hashing.TABLE_DTYPES[dtype].itemsize
    assert row * 100 < resident("hash_tables.npy") < 6 * 100 * (row + 2 * page) + (1 << 20)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="resident pages of a mapping: Linux only")
def test_pages_of_large_tables_are_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is in the kernel's cache is mapped 64 KB at a time around each row. After 640 positions little of
    it is resident, and the sums are the same."""
    sizes, rows, dim = (3, 4, 5, 6, 7, 8), 5000, 256
    tables = np.random.default_rng(0).normal(size=(len(sizes) * rows, dim)).astype(np.float32)
    np.save(tmp_path / "tables.npy", tables)
    ids = np.random.default_rng(1).integers(4, 260, 640 + 7)
    want = np.empty((640, dim), np.float32)
    hashing.HashEmbedding(tables, sizes, 1, rows).many(ids, want)
    left = {}
    for start in (1 << 60, 0):
        monkeypatch.setattr(hashing, "RELEASE_FROM", start)
        mapped = np.load(tmp_path / "tables.npy", mmap_mode="r")
        embedding, out = hashing.HashEmbedding(mapped, sizes, 1, rows), np.empty(dim, np.float32)
        for i in range(640):
            embedding.one(ids[i : i + 8], out)
            np.testing.assert_array_equal(out, want[i])
        left[start] = resident("tables.npy")
        del mapped, embedding
    assert left[0] < 1 << 20 < left[1 << 60]


def resident(file: str) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.endswith(file)]
    assert starts, f"{file} is not mapped"
    sizes = [next(line for line in lines[i:] if line.startswith("Rss:")) for i in starts]
    return sum(int(size.split()[1]) << 10 for size in sizes)
