"""The boundaries of many documents at a time are those of each document alone."""

from __future__ import annotations

import numpy as np
import pytest

from blt.data import Dataset, PatchIndex, prepare
from blt.data.starts import block_boundaries
from blt_runtime.patching import PatchRule

RULES = [
    PatchRule("space"),
    PatchRule("space", max_patch_length=3),
    PatchRule("static", patch_size=4),
    PatchRule("static", patch_size=7, max_patch_length=3),
    PatchRule("static", patch_size=1),
    PatchRule("byte"),
    PatchRule(threshold=0.5),
    PatchRule(threshold=0.5, max_patch_length=2),
    PatchRule(threshold=0.1, monotonic=True, max_patch_length=5),
    PatchRule(threshold=0.4, threshold_add=0.1),
    PatchRule(threshold=0.4, threshold_add=0.1, entropy_dtype="bfloat16"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Documents of 1 to 60 bytes of words, signs and characters of several bytes, in several shards."""
    folder = tmp_path_factory.mktemp("starts")
    random = np.random.default_rng(0)
    alphabet = list("ab1 .\n_ä漢")
    texts = ["".join(random.choice(alphabet, n)).encode() for n in [1, 1, 2, 3, *random.integers(1, 60, 80)]]
    (folder / "a.txt").write_bytes(b"\0".join(texts))
    prepare([folder / "a.txt"], folder / "data", split=(1, 0, 0), shard_bytes=700)
    return Dataset(folder / "data")


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_block_has_the_boundaries_of_its_documents(
    dataset: Dataset, rule: PatchRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, random = dataset.split("train"), np.random.default_rng(1)
    assert len(documents.shard_names) > 2
    values = random.random(int(documents.token_offsets[-1]), np.float32)

    class Known(PatchIndex):
        def entropies(self, document: int) -> np.ndarray:
            return values[slice(*documents.token_offsets[document : document + 2])]

    index = Known(dataset, "train", rule=rule)
    members = random.permutation(np.repeat(np.arange(len(documents)), 2))  # a mixture repeats documents
    expected = np.flatnonzero(np.concatenate([index.starts(int(document)) for document in members]))
    for chunk in (1, 100, 1 << 20):
        monkeypatch.setattr("blt.data.starts.CHUNK", chunk)
        found = block_boundaries(
            rule, documents, members, lambda part: np.concatenate([index.entropies(int(d)) for d in part])
        )
        np.testing.assert_array_equal(found, expected)
    assert not len(block_boundaries(rule, documents, members[:0], lambda part: values[:0]))


def test_pieces_of_documents_are_read_as_the_documents_are(dataset: Dataset) -> None:
    documents, random = dataset.split("train"), np.random.default_rng(2)
    members = random.permutation(np.repeat(np.arange(len(documents)), 5))
    begin = random.integers(0, documents.lengths[members] + 2)
    end = random.integers(begin + 1, documents.lengths[members] + 3)
    expected = [documents.ids(int(d))[first:last] for d, first, last in zip(members, begin, end, strict=True)]
    found = documents.read(members, begin, end)
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, np.concatenate(expected))
    assert documents.texts(members).tobytes() == b"".join(b"\0" + documents.bytes(int(d)) + b"\0" for d in members)
