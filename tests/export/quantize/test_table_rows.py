"""Hash tables in 8 bits: rounding of rows, the values that numpy and torch read, and wrong rows in parity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import blt_export
from blt.bench.weight_bytes import HASH, bundle_weight_bytes
from blt.checkpoint import tensors
from blt.checkpoint.tensors import StoredTensor
from blt.generate.torch_backend import open_model
from blt.model.hashing import hash_ids
from blt_export import bundle, pipeline
from blt_export.quantize.table_rows import quantise_rows
from blt_runtime import Model
from blt_runtime.bundle.bundle import Bundle
from blt_runtime.errors import CheckFailed
from blt_runtime.hashing import HashEmbedding, TableDtype, widen
from blt_runtime.ids import encode
from tests import exports
from tests.export.variants import VARIANTS
from tests.tiny import tiny

TEXT = "A short text, scored twice: once in float32, once in the bundle.\n" * 6


def rows_of_all_sizes(n: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((n, width)) * 10.0 ** rng.uniform(-4, 4, (n, 1))).astype(np.float32)


@pytest.mark.parametrize("width", [2, 7, 64])
def test_the_error_of_a_value_is_at_most_half_a_step(width: int) -> None:
    rows = rows_of_all_sizes(200, width)
    rows[3] = 0
    rows[4] = np.float32(1e-45)  # the smallest number: its scale is zero
    stored = quantise_rows(rows)
    assert stored.dtype == np.int8
    assert stored.shape == (200, width + 4)
    assert stored[:, :-4].min() >= -127
    step = np.abs(rows).max(1, keepdims=True) / 127
    assert (np.abs(widen(stored) - rows) <= 0.501 * step + 1e-44).all()
    assert not widen(stored)[3].any()
    largest = np.abs(rows).argmax(1)[:, None]
    normal = np.delete(np.arange(200), 4)
    picked = np.take_along_axis(widen(stored), largest, 1)[normal]
    np.testing.assert_allclose(picked, np.take_along_axis(rows, largest, 1)[normal], rtol=2e-7)


def test_torch_and_numpy_read_the_same_bits() -> None:
    """The definition, in torch: codes times scale, added in table order."""
    sizes, functions, rows, width = (3, 5), 2, 53, 12
    stored = quantise_rows(rows_of_all_sizes(4 * rows, width))
    ids = np.random.default_rng(1).integers(0, 260, 60)
    codes, scale = torch.from_numpy(stored[:, :-4].copy()), torch.from_numpy(stored[:, -4:].copy()).view(torch.float32)
    row_NT = hash_ids(torch.from_numpy(ids)[None], sizes, functions, rows)[0] + torch.arange(4) * rows
    want = torch.zeros(60, width)
    for t in range(4):
        want = want + codes[row_NT[:, t]].float() * scale[row_NT[:, t]]
    embedding = HashEmbedding(stored, sizes, functions, rows)
    padded = np.concatenate([np.zeros(4, np.int64), ids])
    many, one = np.empty((60, width), np.float32), np.empty(width, np.float32)
    embedding.many(padded, many)
    np.testing.assert_array_equal(many, want.numpy())
    for t in range(60):
        embedding.one(padded[t : t + 5], one)
        np.testing.assert_array_equal(one, want[t].numpy())


def test_tables_are_written_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK", 4 * 3 * 5)
    pieces = tuple(torch.randn(n, 3) for n in (17, 4))
    path = bundle.write_hash_tables(StoredTensor(("a", "b"), pieces), tmp_path / "t.npy", "int8")
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), quantise_rows(torch.cat(pieces).numpy()))


def test_a_bundle_with_tables_in_8_bits(tmp_path: Path) -> None:
    checkpoint = tiny()
    pieces = [encode(TEXT, bos=True)]
    report = blt_export.export(checkpoint, tmp_path / "b", table_dtype="int8", eval_ids=pieces)
    spec = report.manifest.spec.hash
    assert spec is not None
    assert spec.dtype == "int8"
    assert (report.parity[0].output, report.parity[0].measure) == ("hash_embedding", "step")
    assert 0.1 < report.parity[0].error < report.parity[0].tolerance < 1.1
    evaluated = report.manifest.judged
    assert evaluated is not None
    assert evaluated.boundaries_lost == evaluated.boundaries_new == 0  # the entropy model reads no table
    assert evaluated.bits_per_byte != evaluated.float_bits_per_byte
    opened = Bundle.open(tmp_path / "b", verify="full")
    tables = opened.hash_tables()["encoder"]
    assert tables.shape == (spec.tables * spec.rows, spec.dim + 4)
    assert bundle_weight_bytes(opened, 4.0)[HASH] == spec.tables * (spec.dim + 4)
    with pytest.MonkeyPatch.context() as patch:  # float32, with the values that the codes represent
        embedding = checkpoint.require_blt()[0].hash_embedding
        assert embedding is not None
        patch.setattr(embedding.tables.weight, "data", torch.from_numpy(widen(tables)))
        want = open_model(checkpoint).score(pieces[0]).logits
    got = Model.open(tmp_path / "b").score(pieces[0]).logits
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("what", ["scale", "code", "row"])
def test_a_wrong_row_fails_parity(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = bundle.write_hash_tables

    def corrupt(tables: StoredTensor, path: Path, dtype: TableDtype) -> Path:
        written(tables, path, dtype)
        stored = np.load(path)
        if what == "scale":
            stored[:, -4:] = (stored[:, -4:].copy().view("<f4") * np.float32(1.1)).view(np.int8)
        elif what == "code":
            stored[:, 0] = np.where(stored[:, 0] > 0, stored[:, 0] - 9, stored[:, 0] + 9)
        else:
            stored = np.roll(stored, 1, 0)
        np.save(path, stored)
        return path

    monkeypatch.setattr(bundle, "write_hash_tables", corrupt)
    with pytest.raises(CheckFailed, match="hash_embedding differs from PyTorch"):
        pipeline.run(exports.prepare(VARIANTS[0], table_dtype="int8"), tmp_path / "b")
