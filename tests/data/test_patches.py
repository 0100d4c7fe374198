"""Boundaries computed ahead of the step: equal to those of each document alone, cached, with a key of all inputs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from blt.data import Dataset, PatchIndex, choose_threshold, prepare
from blt.data.entropies import CHUNK, ChunkedPass, Float, Tokens
from blt.model import EntropyConfig, EntropyModel
from blt.model.bfloat16 import to_bfloat16
from blt_runtime.errors import ConfigError, InputError
from blt_runtime.patching import PatchRule, patch_lengths
from tests.data.each_document import document_entropies


def small_model(n_layers: int = 1, window: int = 64, seed: int = 0) -> EntropyModel:
    model = EntropyModel(
        EntropyConfig(dim=16, n_layers=n_layers, n_heads=2, ffn_dim=32, window=window, max_seqlen=8192)
    )
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    random = np.random.default_rng(1)
    lengths = [1, 700, 5, 1500, 30, 510, 511, 300, 20, 3000, 2]
    documents = [bytes(random.integers(97, 103, n).astype(np.uint8)) for n in lengths]
    (tmp_path / "a.txt").write_bytes(b"\0".join(documents))
    prepare([tmp_path / "a.txt"], tmp_path / "data", split=(1, 0, 0))
    return Dataset(tmp_path / "data")


def test_starts_are_the_rules_and_cached(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rule = small_model(), PatchRule(threshold=5.4, max_patch_length=9)
    index = PatchIndex(dataset, "train", model).with_rule(rule)
    documents = dataset.split("train")
    for i in range(len(documents)):
        lengths = patch_lengths(rule, documents.ids(i), index.entropies(i), include_next_token=False)
        starts = np.flatnonzero(index.starts(i))
        np.testing.assert_array_equal(starts, np.cumsum(lengths) - lengths)
        assert len(index.starts(i)) == documents.lengths[i] + 2
    monkeypatch.setattr("blt.data.entropy_cache.make_pass", lambda *_, **__: pytest.fail("not read from the cache"))
    again = PatchIndex(dataset, "train", small_model()).with_rule(PatchRule(threshold=5.0))
    np.testing.assert_array_equal(again.entropies(3), index.entropies(3))


def test_the_key_follows_weights_and_newlines(dataset: Dataset) -> None:
    representable = small_model(seed=2).bfloat16().float()
    keys = {
        PatchIndex(dataset, "train", small_model()).key,
        PatchIndex(dataset, "train", small_model(seed=1)).key,
        PatchIndex(dataset, "train", small_model(window=32)).key,
        PatchIndex(dataset, "train", small_model(), reset_newlines=True).key,
        PatchIndex(dataset, "train", representable).key,
        PatchIndex(dataset, "train", to_bfloat16(representable)).key,
    }
    assert len(keys) == 6
    assert PatchIndex(dataset, "train", small_model()).key in keys


def test_a_cache_of_other_data_is_refused(dataset: Dataset) -> None:
    index = PatchIndex(dataset, "train", small_model())
    index.path.parent.mkdir()
    np.save(index.path, np.zeros(3, np.float32))
    with pytest.raises(InputError, match="delete it"):
        index.entropies(0)


def test_a_damaged_cache_is_refused(dataset: Dataset) -> None:
    index = PatchIndex(dataset, "train", small_model())
    index.path.parent.mkdir()
    index.path.write_bytes(b"no array")
    with pytest.raises(InputError, match="delete it"):
        index.entropies(0)


def test_a_split_is_computed_as_its_documents(dataset: Dataset) -> None:
    """The stream over the shards has the documents in order, wherever a slice begins and ends."""
    documents = dataset.split("train")
    whole = np.concatenate([documents.ids(i) for i in range(len(documents))])
    assert len(documents.tokens) == len(whole)
    for begin, end in [(0, 1), (0, 3), (1, 2), (2, 4), (5, 5), (700, 2300), (len(whole) - 1, len(whole)), (0, 10**9)]:
        np.testing.assert_array_equal(documents.tokens[begin:end], whole[begin:end])


class Killed(BaseException):
    pass


def count_chunks(monkeypatch: pytest.MonkeyPatch, kill_at: int | None = None) -> list[int]:
    """The chunks that are computed from now on, by their first token. A run is killed at the chunk `kill_at` of it."""
    found: list[int] = []
    run = ChunkedPass.run

    def counting(self: ChunkedPass, ids: Tokens, begin: int = 0, end: int | None = None) -> Iterator[Float]:
        for count, values in enumerate(run(self, ids, begin, end)):
            if count == kill_at:
                raise Killed
            found.append(begin + count * self.chunk)
            yield values

    monkeypatch.setattr(ChunkedPass, "run", counting)
    return found


def test_a_killed_computation_continues_where_it_stopped(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(n_layers=2)
    monkeypatch.setitem(CHUNK, "cpu", 512)
    expected = np.concatenate(document_entropies(model, [dataset.split("train").tokens[:]]))
    chunks = count_chunks(monkeypatch, kill_at=3)
    for _ in range(30):
        index = PatchIndex(dataset, "train", model)
        try:
            index.compute()
        except Killed:
            assert not index.path.exists()
            continue
        break
    assert chunks == list(range(0, len(expected), 512))
    np.testing.assert_array_equal(np.load(index.path), expected)
    assert [path.name for path in index.path.parent.iterdir()] == [index.path.name]


@pytest.mark.parametrize("bfloat16", [False, True])
def test_entropies_do_not_depend_on_earlier_computations(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bfloat16: bool
) -> None:
    model = small_model(n_layers=2)
    model = to_bfloat16(model.bfloat16().float()) if bfloat16 else model
    monkeypatch.setitem(CHUNK, "cpu", 256)
    expected = PatchIndex(dataset, "train", model)
    expected.compute()
    for seed in range(4):
        copy = tmp_path / f"copy-{seed}"
        shutil.copytree(dataset.folder, copy, ignore=shutil.ignore_patterns("entropies"))
        index = PatchIndex(Dataset(copy), "train", model)
        order = np.random.default_rng(seed).permutation(len(index.documents))
        for part in np.array_split(order, 3):
            index.compute(part)
            assert index.computed(part)
            for document in part:
                np.testing.assert_array_equal(index.entropies(int(document)), expected.entropies(int(document)))
        assert index.path.read_bytes() == expected.path.read_bytes()


def test_only_the_chunks_of_the_documents_are_computed(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK, "cpu", 128)
    index = PatchIndex(dataset, "train", small_model())
    chunks = count_chunks(monkeypatch)
    begin, end = index.documents.token_offsets[5:7]
    assert not index.computed(np.array([5]))
    index.compute(np.array([5]))
    assert chunks == list(range(int(begin) // 128 * 128, int(end), 128))
    index.compute(np.array([5]))
    assert index.computed(np.array([5]))
    assert not index.path.exists()  # the rest is not computed
    assert len(chunks) < 8


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
