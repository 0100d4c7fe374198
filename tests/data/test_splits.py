"""Names of files and folders decide splits, held-out text never becomes training text, and shares get some text."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path, PurePath

import pytest

from blt.data import Dataset, prepare
from blt.data.splits import split_by_name
from blt_runtime.errors import InputError


def write(folder: Path, *names: str, documents: int = 30) -> list[Path]:
    """JSONL files whose documents contain the name of their file."""
    paths = [folder / name for name in names]
    for path, name in zip(paths, names, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(documents)))
    return paths


def files_of(folder: Path, split: str) -> set[str]:
    """The files whose documents are in a split."""
    documents = Dataset(folder).split(split)
    return {documents.bytes(i).decode().split(" ")[0] for i in range(len(documents))}


@pytest.mark.parametrize(
    ("place", "split"),
    [
        ("train.jsonl", "train"),
        ("my.test.jsonl", "test"),
        ("data/train-00000-of-00003.parquet", "train"),
        ("a/b/validation/x.txt", "valid"),
        ("wiki.valid.tokens", "valid"),
        ("train.en", "train"),
        ("Dev/x.txt", "valid"),
        ("news_val.jsonl", "valid"),
        ("TEST1.txt", "test"),
        ("train-clean-100/x.txt", "train"),
        ("latest.jsonl", None),
        ("constrain.txt", None),
        ("testimony/devil.txt", None),
        ("src/test_words.py", None),
        ("test/words.py", "test"),
    ],
)
def test_words_in_names(place: str, split: str | None) -> None:
    assert split_by_name(PurePath(place)) == split


def test_a_name_of_two_splits_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "in", "train/test.jsonl", "train/b.jsonl")
    with pytest.raises(InputError, match=r"train/test.jsonl names the splits test and train"):
        prepare([tmp_path / "in"], tmp_path / "data")


def test_files_of_one_folder_are_their_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "blt.data")
    paths = write(tmp_path / "in", "train.jsonl", "test.jsonl")
    for inputs in ([tmp_path / "in"], paths):
        prepare(inputs, tmp_path / "data", force=True)
        assert files_of(tmp_path / "data", "train") == {"train.jsonl"}
        assert files_of(tmp_path / "data", "test") == {"test.jsonl"}
        assert len(Dataset(tmp_path / "data").split("train")) == 30
    assert f"test: 1 file, by name ({tmp_path}/in/test.jsonl)" in caplog.text
    assert "no validation text: no input is named valid" in caplog.text


def test_folders_given_one_by_one_are_their_splits(tmp_path: Path) -> None:
    write(tmp_path, "in/train/a.jsonl", "in/dev/a.jsonl", "in/test/x/a.jsonl")
    prepare([tmp_path / "in" / name for name in ("train", "dev", "test")], tmp_path / "data")
    assert files_of(tmp_path / "data", "train") == {"in/train/a.jsonl"}
    assert files_of(tmp_path / "data", "valid") == {"in/dev/a.jsonl"}


def test_shares_cut_training_text_and_never_held_out_text(tmp_path: Path) -> None:
    write(tmp_path / "in", "train.jsonl", "more.jsonl", "test.jsonl")
    with pytest.raises(
        InputError, match=r"train.jsonl: named train; .*more.jsonl: without a split in the name.*--split"
    ):
        prepare([tmp_path / "in"], tmp_path / "data")
    prepare([tmp_path / "in"], tmp_path / "data", split=(50, 50, 50))
    assert files_of(tmp_path / "data", "test") == {"test.jsonl"}
    assert files_of(tmp_path / "data", "train") == {"train.jsonl", "more.jsonl"}
    assert files_of(tmp_path / "data", "valid") == {"train.jsonl", "more.jsonl"}
    prepare([tmp_path / "in"], tmp_path / "hashed", split=(50, 50, 50), ignore_names=True)
    assert "test.jsonl" in files_of(tmp_path / "hashed", "train")


def test_files_without_a_split_beside_held_out_ones_are_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "blt.data")
    write(tmp_path / "in", "a.jsonl", "b.jsonl", "test.jsonl")
    prepare([tmp_path / "in"], tmp_path / "data")
    assert files_of(tmp_path / "data", "test") == {"test.jsonl"}
    assert files_of(tmp_path / "data", "train") == {"a.jsonl", "b.jsonl"}
    assert len(Dataset(tmp_path / "data").split("valid")) > 0
    assert "train/valid: 2 files, by a hash of each document" in caplog.text


def test_held_out_names_alone_leave_nothing_to_train_on(tmp_path: Path) -> None:
    write(tmp_path / "in", "valid.jsonl", "test.jsonl")
    with pytest.raises(InputError, match="every input is named as held-out text"):
        prepare([tmp_path / "in"], tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_single_file_is_split_whatever_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "blt.data")
    write(tmp_path, "test.jsonl")
    prepare([tmp_path / "test.jsonl"], tmp_path / "data")
    assert len(Dataset(tmp_path / "data").split("train")) > 20
    assert "selects no split" in caplog.text


@pytest.mark.parametrize("documents", [3, 4, 10, 60])
def test_every_share_has_a_document(tmp_path: Path, documents: int) -> None:
    (path,) = write(tmp_path, "a.jsonl", documents=documents)
    for seed in range(5):
        prepare([path], tmp_path / "data", seed=seed, force=True)
        counts = [len(Dataset(tmp_path / "data").split(name)) for name in ("train", "valid", "test")]
        assert min(counts) > 0
        assert sum(counts) == documents
        assert counts[0] >= documents - 4


def test_records_of_one_prompt_move_together(tmp_path: Path) -> None:
    records = [{"p": f"question {i % 3}", "c": f"answer {i}"} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare([tmp_path / "a.jsonl"], tmp_path / "data", prompt_field="p", completion_field="c")
    splits = [Dataset(tmp_path / "data").split(name) for name in ("train", "valid", "test")]
    assert [{s.bytes(i)[:10] for i in range(len(s))} for s in splits] == [
        {x} for x in {s.bytes(0)[:10]: 0 for s in splits}
    ]
    assert [len(split) for split in splits] == [10, 10, 10]


def test_a_single_document_is_cut(tmp_path: Path) -> None:
    letters = random.Random(0).choices(string.ascii_letters + "      \n", k=50_000)
    (tmp_path / "book.txt").write_text("".join(letters))
    prepare([tmp_path / "book.txt"], tmp_path / "data", split=(8, 1, 1))
    splits = [Dataset(tmp_path / "data").split(name) for name in ("train", "valid", "test")]
    assert [len(split) for split in splits] == [1, 1, 1]
    assert b"".join(split.bytes(0) for split in splits) == "".join(letters).encode()
    assert all(4000 < split.n_bytes < 6000 for split in splits[1:])
    assert all(split.bytes(0).endswith((b"\n", b" ")) for split in splits[:2])


@pytest.mark.parametrize("text", ["x", "One line.\n", "ä" * 300])
def test_a_tiny_document_is_training_text(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text(text)
    for seed in range(40):  # by its hash it would sometimes be held out
        prepare([tmp_path / "a.txt"], tmp_path / "data", split=(1, 1, 1), seed=seed, force=True)
        assert Dataset(tmp_path / "data").split("train").n_bytes == len(text.encode())
    assert "no validation text: there is too little text" in caplog.text


def test_a_cut_is_between_characters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ä" * 3000)
    prepare([tmp_path / "a.txt"], tmp_path / "data")
    splits = [Dataset(tmp_path / "data").split(name) for name in ("train", "valid", "test")]
    assert "".join(split.bytes(0).decode() for split in splits) == "ä" * 3000
