"""Boundaries ahead of the step: the same as evaluating each document alone, cached, and keyed by what matters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from blt.data import Dataset, PatchIndex, choose_threshold, document_entropies, prepare
from blt.data.patches import _pack, _pieces
from blt.model import EntropyConfig, EntropyModel, entropy_of
from blt_runtime.errors import ConfigError, InputError
from blt_runtime.patching import PatchRule, patch_lengths


def small_model(n_layers: int = 1, window: int = 64, seed: int = 0) -> EntropyModel:
    model = EntropyModel(
        EntropyConfig(dim=16, n_layers=n_layers, n_heads=2, ffn_dim=32, window=window, max_seqlen=8192)
    )
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def alone(model: EntropyModel, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return entropy_of(model(torch.as_tensor(ids[None].astype(np.int64))))[0].numpy()


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    random = np.random.default_rng(1)
    lengths = [1, 700, 5, 1500, 30, 510, 511, 300, 20, 3000, 2]
    documents = [bytes(random.integers(97, 103, n).astype(np.uint8)) for n in lengths]
    (tmp_path / "a.txt").write_bytes(b"\0".join(documents))
    prepare([tmp_path / "a.txt"], tmp_path / "data", split=(1, 0, 0))
    return Dataset(tmp_path / "data")


def all_ids(dataset: Dataset) -> list[np.ndarray]:
    documents = dataset.split("train")
    return [documents.ids(i) for i in range(len(documents))]


def test_one_layer_equals_each_document_alone(dataset: Dataset) -> None:
    """One window of context in front of a piece is all that a single layer can see, so packing must be exact."""
    model = small_model()
    for found, ids in zip(document_entropies(model, all_ids(dataset)), all_ids(dataset), strict=True):
        np.testing.assert_allclose(found, alone(model, ids), atol=2e-6)


def test_deeper_models_differ_only_behind_a_cut_and_little(dataset: Dataset) -> None:
    model = small_model(n_layers=3)
    differences = []
    for found, ids in zip(document_entropies(model, all_ids(dataset)), all_ids(dataset), strict=True):
        expected = alone(model, ids)
        np.testing.assert_allclose(found[:512], expected[:512], atol=2e-6)
        differences += np.abs(found - expected)[512:].tolist()
    assert np.max(differences) < 0.05
    assert np.mean(np.array(differences) > 1e-3) < 0.25


def test_reset_newlines_reaches_the_model(dataset: Dataset) -> None:
    model = small_model()
    ids = [np.array([1, 100, 101, 14, 102, 103, 2], np.int16)]
    (plain,), (reset,) = document_entropies(model, ids), document_entropies(model, ids, reset_newlines=True)
    np.testing.assert_allclose(plain[:4], reset[:4], atol=1e-6)
    assert np.abs(plain[4:] - reset[4:]).max() > 1e-4


def test_pieces_cover_and_only_whole_rows_lack_an_end() -> None:
    lengths = [3, 100, 50, 51, 7, 260]
    pieces = _pieces(lengths, 50, 20)
    for document, length in enumerate(lengths):
        kept = [t for piece in pieces if piece.document == document for t in range(piece.keep, piece.end)]
        assert kept == list(range(length))
    rows = _pack(pieces, 50)
    assert sum(map(len, rows)) == len(pieces)
    for row in rows:
        assert sum(piece.length for piece in row) <= 50
        assert all(piece.end == lengths[piece.document] for piece in row[:-1])


def test_starts_are_the_rules_and_cached(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rule = small_model(), PatchRule(threshold=5.4, max_patch_length=9)
    index = PatchIndex(dataset, "train", model).with_rule(rule)
    documents = dataset.split("train")
    for i in range(len(documents)):
        lengths = patch_lengths(rule, documents.ids(i), index.entropies(i), include_next_token=False)
        starts = np.flatnonzero(index.starts(i))
        np.testing.assert_array_equal(starts, np.cumsum(lengths) - lengths)
        assert len(index.starts(i)) == documents.lengths[i] + 2
    monkeypatch.setattr("blt.data.patches.document_entropies", lambda *_: pytest.fail("not taken from the cache"))
    again = PatchIndex(dataset, "train", small_model()).with_rule(PatchRule(threshold=5.0))
    np.testing.assert_array_equal(again.entropies(3), index.entropies(3))


def test_the_key_follows_weights_and_newlines(dataset: Dataset) -> None:
    keys = {
        PatchIndex(dataset, "train", small_model()).key,
        PatchIndex(dataset, "train", small_model(seed=1)).key,
        PatchIndex(dataset, "train", small_model(window=32)).key,
        PatchIndex(dataset, "train", small_model(), reset_newlines=True).key,
    }
    assert len(keys) == 4
    assert PatchIndex(dataset, "train", small_model()).key in keys


def test_a_cache_of_other_data_is_refused(dataset: Dataset) -> None:
    index = PatchIndex(dataset, "train", small_model())
    index.path.parent.mkdir()
    np.save(index.path, np.zeros(3, np.float32))
    with pytest.raises(InputError, match="delete it"):
        index.entropies(0)


@pytest.mark.parametrize("monotonic", [False, True])
def test_the_threshold_gives_the_wanted_patch_size(dataset: Dataset, monotonic: bool) -> None:
    index = PatchIndex(dataset, "train", small_model())
    rule = PatchRule(threshold=0.0, monotonic=monotonic, max_patch_length=12)
    members = list(range(len(index.documents)))
    threshold = choose_threshold(index, rule, 4.0, members)
    chosen = index.with_rule(PatchRule(threshold=threshold, monotonic=monotonic, max_patch_length=12))
    patches = sum(int(chosen.starts(i).sum()) - 1 for i in members)  # BOS is none
    assert index.documents.n_bytes / patches == pytest.approx(4.0, rel=0.01)


def test_an_unreachable_patch_size_is_an_error(dataset: Dataset) -> None:
    index = PatchIndex(dataset, "train", small_model())
    with pytest.raises(ConfigError, match="target_patch_size"):
        choose_threshold(index, PatchRule(threshold=0.0, max_patch_length=4), 6.0, [0, 1, 2, 3])


def test_rules_that_need_no_entropies_need_no_model(dataset: Dataset) -> None:
    index = PatchIndex(dataset, "train")
    assert index.with_rule(PatchRule("byte")).starts(0).all()
    with pytest.raises(ConfigError, match="entropy model"):
        index.with_rule(PatchRule(threshold=1.0))
