"""Parquet as text: rows are documents, whatever the row groups; damaged files and wrong columns are one-line errors."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from blt.data import Dataset, prepare
from blt.data.parquet_pages import pages
from blt_runtime.errors import InputError, MissingExtra

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"text {i} ä\n" * (i % 7) for i in range(2500)]


def table(path: Path, columns: dict[str, list[Any]], **options: Any) -> Path:
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def same_names(path: Path) -> Path:
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["text"] * 2), path)
    return path


def contents(folder: Path) -> Counter[bytes]:
    train = Dataset(folder).split("train")
    return Counter(train.bytes(i) for i in range(len(train)))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_row_is_a_document(tmp_path: Path, compression: str) -> None:
    columns: dict[str, list[Any]] = {"body": TEXTS, "id": list(range(len(TEXTS)))}
    path = table(tmp_path / "in" / "web.en.parquet", columns, row_group_size=700, compression=compression)
    prepare([path.parent], tmp_path / "data", text_field="body", split=(1, 0, 0), workers=2)
    assert contents(tmp_path / "data") == Counter(text.encode() for text in TEXTS if text)
    assert Dataset(tmp_path / "data").manifest["groups"] == ["web.en"]


def test_columns_of_bytes_are_read_as_they_are(tmp_path: Path) -> None:
    path = table(tmp_path / "blob", {"text": [b"\xff\x00\xfe", b"plain"]})
    prepare([path], tmp_path / "data", format="parquet", split=(1, 0, 0))
    assert contents(tmp_path / "data") == Counter([b"\xff\x00\xfe", b"plain"])


def test_prompts_and_completions(tmp_path: Path) -> None:
    path = table(tmp_path / "pairs.parquet", {"ask": ["a?", "ää"], "say": ["b", "c"]})
    prepare([path], tmp_path / "data", prompt_field="ask", completion_field="say", split=(1, 0, 0))
    assert sorted(Dataset(tmp_path / "data").split("train").prompt_lengths) == [2, 4]


def test_null_rows_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = table(tmp_path / "null.parquet", {"text": ["a", "", None, "b", None]})
    nulls = table(tmp_path / "nulls.parquet", {"text": pyarrow.array([None], pyarrow.null())})
    prepare([path, nulls], tmp_path / "data", split=(1, 0, 0))
    assert contents(tmp_path / "data") == Counter([b"a", b"b"])
    assert f"3 records of null text: skipped (first: {path}, row 3)" in caplog.text
    with pytest.raises(InputError, match=r"null.parquet, row 3: null text"):
        prepare([path], tmp_path / "strict", split=(1, 0, 0), strict=True)


def test_invalid_utf8_is_taken_as_bytes_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = pyarrow.array([b"fine", b"caf\xe9", None], pyarrow.binary())
    strings = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    path = tmp_path / "bad.parquet"
    parquet.write_table(pyarrow.Table.from_arrays([strings], names=["text"]), path)
    prepare([path], tmp_path / "data", split=(1, 0, 0))
    assert contents(tmp_path / "data") == Counter([b"fine", b"caf\xe9"])
    assert f"1 record of invalid UTF-8: taken as bytes (first: {path}, row 2)" in caplog.text
    with pytest.raises(InputError, match="row 2"):
        prepare([path], tmp_path / "strict", strict=True)


def test_nested_columns(tmp_path: Path) -> None:
    rows = [{"text": "a", "id": 1}, None, {"text": None, "id": 2}, {"text": "b", "id": 3}]
    path = table(tmp_path / "nested.parquet", {"meta": rows, "text": ["no"] * 4})
    prepare([path], tmp_path / "data", text_field="meta.text", split=(1, 0, 0))
    assert contents(tmp_path / "data") == Counter([b"a", b"b"])
    dotted = table(tmp_path / "dotted.parquet", {"meta.text": ["c"]})
    prepare([dotted], tmp_path / "dots", text_field="meta.text", split=(1, 0, 0))
    assert contents(tmp_path / "dots") == Counter([b"c"])
    with pytest.raises(InputError, match=r"no text under the key 'meta\.txt'"):
        prepare([path], tmp_path / "wrong", text_field="meta.txt")


def test_kinds_of_columns(tmp_path: Path) -> None:
    texts = ["a", "b", "a", None]
    kinds = {
        "large": pyarrow.array(texts, pyarrow.large_string()),
        "dictionary": pyarrow.array(texts).dictionary_encode(),
        "bytes": pyarrow.array([b"a", b"b", b"a", None], pyarrow.large_binary()),
    }
    for name, column in kinds.items():
        path = table(tmp_path / f"{name}.parquet", {"text": column})
        prepare([path], tmp_path / name, split=(1, 0, 0))
        assert contents(tmp_path / name) == Counter([b"a", b"b", b"a"])


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "zstd", "gzip"])
def test_the_sizes_of_all_pages_are_found(tmp_path: Path, version: str, compression: str) -> None:
    columns = {"text": [f"text {i} " * 50 for i in range(3000)], "few": ["a", "b", "c"] * 1000}
    path = table(
        tmp_path / "a.parquet", columns, data_page_size=10_000, compression=compression, data_page_version=version,
        use_dictionary=["few"], row_group_size=1000, write_page_checksum=version == "1.0",
        write_batch_size=20,
    )  # fmt: skip
    metadata = parquet.read_metadata(path)
    found = list(pages(path, metadata, {"text"}))
    assert len(found) > 3 * 30
    assert not any(page.dictionary for page in found)
    assert sum(len(text) for text in columns["text"]) <= sum(page.uncompressed for page in found)
    few = list(pages(path, metadata, {"few"}))
    assert sum(page.dictionary for page in few) == 3
    assert len(few) >= 6


def test_pages_and_rows_beyond_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "a.parquet", {"text": ["a" * 3_000_000] * 4}, compression="zstd", data_page_size=1 << 25)
    for dictionary in (False, True):
        table(path, {"text": ["a" * 3_000_000] * 4}, compression="zstd", use_dictionary=dictionary)
        with pytest.raises(InputError, match=r"a page of .* bytes; give more memory with --max-memory"):
            prepare([path], tmp_path / "none", max_memory=1 << 20)
        prepare([path], tmp_path / "data", max_memory=1 << 24, split=(1, 0, 0), force=True)
        assert contents(tmp_path / "data") == Counter({b"a" * 3_000_000: 4})
    monkeypatch.setattr("blt.data.parquet.pages", lambda *_: iter(()))
    table(path, {"text": ["a" * 3_000_000] * 4}, compression="zstd", use_dictionary=False)
    with pytest.raises(InputError, match=r"rows of .* bytes"):
        prepare([path], tmp_path / "rows", max_memory=1 << 20)


def test_bad_files(tmp_path: Path) -> None:
    whole = table(tmp_path / "whole.parquet", {"text": TEXTS}, compression="none")
    cut, flipped = tmp_path / "cut.parquet", tmp_path / "flipped.parquet"
    cut.write_bytes(whole.read_bytes()[:-100])
    content = bytearray(whole.read_bytes())
    content[20:60] = bytes(40)
    flipped.write_bytes(content)
    bad = {
        "is the file complete": [cut, flipped],
        "row 1: no text under the key 'text'; name the right key with --text-field": [
            table(tmp_path / "other.parquet", {"body": ["x"]})
        ],
        "2 columns are named 'text'": [same_names(tmp_path / "twice.parquet")],
        "row 1: no text": [table(tmp_path / "numbers.parquet", {"text": [1]})],
        "inputs are empty": [table(tmp_path / "empty.parquet", {"text": pyarrow.array([], pyarrow.string())})],
    }
    for message, paths in bad.items():
        for path in paths:
            with pytest.raises(InputError, match=message) as caught:
                prepare([path], tmp_path / "data")
            assert "\n" not in str(caught.value)
            assert not (tmp_path / "data").exists()


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "a.parquet", {"text": ["x"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"blt-lm\[parquet\]"):
        prepare([path], tmp_path / "data")
