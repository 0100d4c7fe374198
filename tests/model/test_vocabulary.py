"""BPE vocabularies over bytes: tokens decode to the text they were made of, and equal texts give equal vocabularies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blt.data import prepare
from blt.data import token_cache as cache
from blt.data.batches import BatchShape
from blt.data.dataset import Dataset
from blt.data.packing import Loader
from blt.model.vocabulary import PIECE, SPLIT, Vocabulary, alphabet, read_vocabulary, train_vocabulary
from blt_runtime.errors import ConfigError, InputError, MissingExtra
from blt_runtime.ids import BOS, EOS, OFFSET
from tests.model.texts import TEXTS

SOURCE = "from blt.model.vocabulary import train_vocabulary; from tests.model.texts import TEXTS"


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return train_vocabulary(TEXTS, 290)


@settings(max_examples=60)
@given(st.one_of(st.binary(max_size=300), st.text(max_size=200).map(lambda s: s.encode("utf-8", "surrogatepass"))))
def test_tokens_decode_to_the_text(text: bytes) -> None:
    vocabulary = train_vocabulary(TEXTS, 290)
    ids = vocabulary.encode(text)
    assert vocabulary.decode([BOS, *ids, EOS]) == text
    assert vocabulary.token_bytes[ids].sum() == len(text)
    assert not len(ids) or ids.min() >= OFFSET


def test_bytes_that_are_not_utf8_are_tokens_of_their_own(vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode(b"the\xff\xfethe")
    whole = vocabulary.encode(b"the")
    assert len(whole) < 3
    assert list(ids) == [*whole, *vocabulary.encode(b"\xff"), *vocabulary.encode(b"\xfe"), *whole]
    assert vocabulary.decode(vocabulary.encode(bytes(range(256)))) == bytes(range(256))


def test_a_text_longer_than_one_call_of_the_tokenizer(vocabulary: Vocabulary) -> None:
    text = b"the " * (PIECE // 4 + 5)
    assert vocabulary.token_bytes[vocabulary.encode(text)].sum() == len(text)


def test_size_and_ids(vocabulary: Vocabulary) -> None:
    assert vocabulary.size == 290 == len(vocabulary.token_bytes)
    assert list(vocabulary.token_bytes[:OFFSET]) == [0] * OFFSET
    assert sorted(alphabet().values()) == list(range(256))
    assert train_vocabulary([b"ab"], 400).size == OFFSET + 256 + 1  # only one pair
    with pytest.raises(ValueError, match=r"0\.\.289"):
        vocabulary.decode([290])


def test_another_process_trains_the_same_vocabulary(vocabulary: Vocabulary, repo: Path) -> None:
    path = os.pathsep.join(str(repo / part) for part in ("", "export", "runtime"))
    done = subprocess.run(
        [sys.executable, "-c", f"{SOURCE}; print(train_vocabulary(TEXTS, 290).key)"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path, "RAYON_NUM_THREADS": "3"},
    )
    assert done.stdout.strip() == vocabulary.key


def changed(vocabulary: Vocabulary, **sections: object) -> str:
    return json.dumps(json.loads(vocabulary.text) | sections)


def test_a_special_token_in_the_text_is_ordinary_text(vocabulary: Vocabulary) -> None:
    added = {"id": 286, "content": "<|end|>", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    marked = Vocabulary(changed(vocabulary, added_tokens=[added | flags]))
    assert 286 + OFFSET not in marked.encode(b"the <|end|> of")
    assert marked.decode(marked.encode(b"the <|end|> of")) == b"the <|end|> of"


def test_tokenizers_of_other_kinds_are_refused(vocabulary: Vocabulary, tmp_path: Path) -> None:
    wrong = {
        "is not a tokenizer.json": "{}",
        "without a normaliser": changed(vocabulary, normalizer={"type": "Lowercase"}),
        "no token for 1 of the bytes": vocabulary.text.replace('"!"', '"ThatIsNoByte"', 1),
    }
    for message, text in wrong.items():
        with pytest.raises(ConfigError, match=message) as caught:
            Vocabulary(text, "t.json")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_vocabulary(tmp_path / "missing.json")
    spaced = changed(vocabulary, pre_tokenizer={"type": "Whitespace"})  # drops spaces
    with pytest.raises(InputError, match="every byte"):
        Vocabulary(spaced).encode(b"the cat")
    assert SPLIT in json.loads(vocabulary.text)["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtra, match="bpe"):
        train_vocabulary(TEXTS, 290)


# --- documents -------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    random = np.random.default_rng(0)
    documents = [
        b" ".join(random.choice([b"the", b"cat", b"\xff", "ä".encode()], n)) for n in random.integers(1, 60, 40)
    ]
    (tmp_path / "a.txt").write_bytes(b"\0".join(documents))
    prepare([tmp_path / "a.txt"], tmp_path / "data", split=(80, 20, 0))
    return Dataset(tmp_path / "data")


def test_tokens_of_documents_decode_to_the_documents(dataset: Dataset, vocabulary: Vocabulary) -> None:
    for split in ("train", "valid", "test"):
        documents, tokens = dataset.split(split), cache.tokenised(dataset, split, vocabulary)
        assert len(tokens) == len(documents)
        for index in range(len(documents)):
            ids = tokens.ids(index)
            assert (ids[0], ids[-1], len(ids)) == (BOS, EOS, tokens.lengths[index] + 2)
            assert vocabulary.decode(ids) == documents.bytes(index)


def test_tokens_are_cached(dataset: Dataset, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cache.tokenised(dataset, "train", vocabulary)
    members = np.arange(len(dataset.split("train")))
    trained = cache.vocabulary_for(dataset, members, size=300, train_bytes=1 << 20)
    monkeypatch.setattr(cache, "_write", None)
    monkeypatch.setattr(cache, "train_vocabulary", None)
    assert list(cache.tokenised(dataset, "train", vocabulary).ids(3)) == list(first.ids(3))
    assert cache.vocabulary_for(dataset, members, size=300, train_bytes=1 << 20).key == trained.key


def test_an_interrupted_or_damaged_cache(
    dataset: Dataset, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_log_progress", stop)
        with pytest.raises(KeyboardInterrupt):
            cache.tokenised(dataset, "train", vocabulary)
    assert not list((dataset.folder / cache.TOKENS).iterdir())
    cache.tokenised(dataset, "train", vocabulary)
    file = next((dataset.folder / cache.TOKENS).glob("*.ids"))
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(InputError, match="delete it"):
        cache.tokenised(dataset, "train", vocabulary)


def test_files_of_a_killed_process_are_overwritten(dataset: Dataset, vocabulary: Vocabulary) -> None:
    folder, expected = dataset.folder / cache.TOKENS, cache.tokenised(dataset, "train", vocabulary)
    members = np.arange(len(expected))
    trained = cache.vocabulary_for(dataset, members, size=300, train_bytes=1 << 20).key
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    for name in whole:
        (folder / name).rename(folder / f".{name}.part")  # a killed process: hidden files, none of them complete
        (folder / f".{name}.part").write_bytes(b"torn" * 9999)
    cache.tokenised(dataset, "train", vocabulary)
    assert cache.vocabulary_for(dataset, members, size=300, train_bytes=1 << 20).key == trained
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole


def test_a_folder_that_cannot_be_written_is_one_clear_error(dataset: Dataset, vocabulary: Vocabulary) -> None:
    (dataset.folder / cache.TOKENS).write_text("in the way")
    members = np.arange(4)
    for use in (
        lambda: cache.tokenised(dataset, "train", vocabulary),
        lambda: cache.vocabulary_for(dataset, members, size=300, train_bytes=1 << 20),
        lambda: cache.save_vocabulary(vocabulary, dataset.folder / cache.TOKENS / "t.json"),
    ):
        with pytest.raises(InputError, match="cannot write to") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_cached_tokens_depend_on_document_boundaries(vocabulary: Vocabulary, tmp_path: Path) -> None:
    """The same bytes with other boundaries are other documents: the cache of one is not used for the other."""
    found = []
    for text in (b"the cat\0s", b"the\0 cats"):
        (tmp_path / "a.txt").write_bytes(text)
        prepare([tmp_path / "a.txt"], tmp_path / "data", split=(1, 0, 0), force=True)
        dataset = Dataset(tmp_path / "data")
        kept = tmp_path / "kept"
        if kept.exists():
            kept.rename(dataset.folder / cache.TOKENS)
        tokens = cache.tokenised(dataset, "train", vocabulary)
        found.append([vocabulary.decode(tokens.ids(index)) for index in range(2)])
        (dataset.folder / cache.TOKENS).rename(kept)
    assert found == [[b"the cat", b"s"], [b"the", b" cats"]]


def test_a_vocabulary_from_a_file(dataset: Dataset, vocabulary: Vocabulary, tmp_path: Path) -> None:
    cache.save_vocabulary(vocabulary, tmp_path / "t.json")
    members = np.arange(4)
    assert (
        cache.vocabulary_for(dataset, members, size=300, train_bytes=1, path=str(tmp_path / "t.json")).key
        == vocabulary.key
    )
    with pytest.raises(ConfigError, match="has 290 ids"):
        cache.vocabulary_for(dataset, members, size=289, train_bytes=1, path=str(tmp_path / "t.json"))


def test_batches_count_the_bytes_of_tokens(dataset: Dataset, vocabulary: Vocabulary) -> None:
    tokens = cache.tokenised(dataset, "train", vocabulary)
    batches = list(Loader(tokens, BatchShape(3, (16, 32))).one_pass())
    assert sum(batch.n_bytes for batch in batches) == dataset.split("train").n_bytes
    assert sum(batch.n_targets for batch in batches) == (tokens.lengths + 1).sum()  # all but BOS
