"""`prepare`, `info` and reading back: nothing lost, splits respected, bad input refused in one line."""

from __future__ import annotations

import base64
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from blt import files
from blt.data import Dataset, info, prepare
from blt_runtime.errors import BltError, InputError, UsageError
from blt_runtime.ids import BOS, EOS, OFFSET


def everything(folder: Path) -> Counter[bytes]:
    dataset = Dataset(folder)
    splits = [dataset.split(name) for name in ("train", "valid", "test")]
    return Counter(split.bytes(index) for split in splits for index in range(len(split)))


def write_text(path: Path, documents: list[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0".join(documents))
    return path


TEXT = bytes([*b"\t\n\r\x1b", *range(32, 127), *range(128, 256)])
"""Every byte that occurs in a text of some encoding."""
DOCUMENTS = [bytes([65 + i % 26]) * (i + 1) + TEXT for i in range(60)]


def test_every_document_is_in_exactly_one_split(tmp_path: Path) -> None:
    source = write_text(tmp_path / "many.txt", DOCUMENTS)
    manifest = prepare([source], tmp_path / "data", split=(60, 20, 20))
    assert everything(tmp_path / "data") == Counter(DOCUMENTS)
    assert all(manifest["splits"][name]["documents"] > 0 for name in ("train", "valid", "test"))
    assert sum(split["bytes"] for split in manifest["splits"].values()) == sum(map(len, DOCUMENTS))


def test_the_split_follows_content_and_seed_not_order(tmp_path: Path) -> None:
    prepare([write_text(tmp_path / "a.txt", DOCUMENTS)], tmp_path / "1", split=(1, 1, 1))
    prepare([write_text(tmp_path / "b.txt", DOCUMENTS[::-1])], tmp_path / "2", split=(1, 1, 1))
    prepare([tmp_path / "a.txt"], tmp_path / "3", split=(1, 1, 1), seed=7)
    found = [Dataset(tmp_path / name).split("valid") for name in "123"]
    first, second, third = ({split.bytes(i) for i in range(len(split))} for split in found)
    assert first == second
    assert first != third


def test_a_file_without_nul_is_one_document_and_raw_bytes_are_fine(tmp_path: Path) -> None:
    content = bytes(range(1, 256)) * 3
    (tmp_path / "raw").write_bytes(content)
    with pytest.raises(InputError, match="binary data"):
        prepare([tmp_path / "raw"], tmp_path / "data", split=(1, 0, 0))
    prepare([tmp_path / "raw"], tmp_path / "data", format="txt", split=(1, 0, 0))
    documents = Dataset(tmp_path / "data").split("train")
    assert [documents.bytes(i) for i in range(len(documents))] == [content]
    expected = [BOS, *(byte + OFFSET for byte in content), EOS]
    np.testing.assert_array_equal(documents.ids(0), expected)


def test_documents_longer_than_a_read_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blt.data.readers.READ_BYTES", 7)
    source = write_text(tmp_path / "a.txt", DOCUMENTS)
    prepare([source], tmp_path / "data")
    assert everything(tmp_path / "data") == Counter(DOCUMENTS)


def test_split_folders_groups_shards_and_workers(tmp_path: Path) -> None:
    for split, part in {"train": DOCUMENTS[:40], "valid": DOCUMENTS[40:50], "test": DOCUMENTS[50:]}.items():
        write_text(tmp_path / "in" / split / "code.go.txt", part[::2])
        write_text(tmp_path / "in" / split / "prose.en.txt", part[1::2])
    prepare([tmp_path / "in"], tmp_path / "data", shard_bytes=2000, workers=3)
    dataset = Dataset(tmp_path / "data")
    valid = dataset.split("valid")
    assert {valid.bytes(i) for i in range(len(valid))} == set(DOCUMENTS[40:50])
    assert {valid.group(i) for i in range(len(valid))} == {"code.go", "prose.en"}
    assert {valid.bytes(int(i)) for i in valid.of_groups(["code.go"])} == set(DOCUMENTS[40:50:2])
    assert len(dataset.manifest["splits"]["train"]["shards"]) > 3
    assert everything(tmp_path / "data") == Counter(DOCUMENTS)
    prepare([tmp_path / "in"], tmp_path / "one", shard_bytes=2000, workers=1)
    assert Dataset(tmp_path / "one").manifest == dataset.manifest
    report = info(tmp_path / "data")
    assert report["splits"]["test"]["groups"]["prose.en"]["documents"] == 5
    dataset.verify()


def test_dedup_keeps_one_and_prefers_held_out_text(tmp_path: Path) -> None:
    write_text(tmp_path / "in" / "train" / "a.txt", [b"same", b"same", b"only here"])
    write_text(tmp_path / "in" / "valid" / "a.txt", [b"same"])
    manifest = prepare([tmp_path / "in"], tmp_path / "data", dedup=True)
    assert everything(tmp_path / "data") == Counter([b"same", b"only here"])
    assert manifest["splits"]["valid"]["documents"] == 1
    assert manifest["duplicates_dropped"] == 2


def test_jsonl_plain_and_gzip(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"body": f"text {i} ä"}) + "\n\n" for i in range(20))
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    prepare([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"], tmp_path / "data", text_field="body")
    assert everything(tmp_path / "data") == Counter({f"text {i} ä".encode(): 2 for i in range(20)})
    assert Dataset(tmp_path / "data").manifest["groups"] == ["a", "b"]


def test_a_json_file_is_records_unless_text_is_requested(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    prepare([tmp_path / "a.json"], tmp_path / "records")
    assert everything(tmp_path / "records") == Counter([b"one", b"two"])
    assert Dataset(tmp_path / "records").manifest["groups"] == ["a"]
    prepare([tmp_path / "a.json"], tmp_path / "text", format="txt", split=(1, 0, 0))
    assert everything(tmp_path / "text") == Counter([(tmp_path / "a.json").read_bytes()])


def test_zstandard(tmp_path: Path) -> None:
    """One frame, and several with a skippable one between them, as parallel compressors write."""
    half = [zstandard.compress(b"\0".join(part)) for part in (DOCUMENTS[:30], [b"", *DOCUMENTS[30:]])]
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"1234"
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"\0".join(DOCUMENTS)))
    (tmp_path / "b.txt.zst").write_bytes(half[0] + skippable + half[1])
    prepare([tmp_path / "a.txt.zst", tmp_path / "b.txt.zst"], tmp_path / "data")
    assert everything(tmp_path / "data") == Counter(DOCUMENTS * 2)


def test_binary_files_read_as_text_are_bytes_and_nul_ends_a_document(tmp_path: Path) -> None:
    (tmp_path / "program.bin").write_bytes(b"\x7fELF\xff\xfe\0\0\x80\x81\0")
    prepare([tmp_path / "program.bin"], tmp_path / "data", format="txt", split=(1, 0, 0))
    assert everything(tmp_path / "data") == Counter([b"\x7fELF\xff\xfe", b"\x80\x81"])


def test_one_huge_document_and_many_of_one_byte(tmp_path: Path) -> None:
    huge = TEXT * 90_000  # five reads long
    (tmp_path / "huge.txt").write_bytes(huge)
    (tmp_path / "tiny.txt").write_bytes(b"\0".join(bytes([65 + i % 26]) for i in range(500)))
    inputs = [tmp_path / "huge.txt", tmp_path / "tiny.txt"]
    prepare(inputs, tmp_path / "data", format="txt", split=(1, 0, 0), shard_bytes=1000)
    documents = Dataset(tmp_path / "data").split("train")
    assert sorted(documents.lengths)[-2:] == [1, len(huge)]
    assert documents.bytes(int(documents.lengths.argmax())) == huge
    assert documents.tokens[100 : 100 + 2 * len(huge)].size == len(huge) + 2 + 500 * 3 - 100


def broken_inputs(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text"\n')
    (tmp_path / "field.jsonl").write_text('{"other": "x"}\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "]" * 100_000 + "\n")
    (tmp_path / "list.json").write_text('["one", "two"]\n')
    (tmp_path / "pretty.json").write_text(json.dumps({"text": "a", "more": [1, 2]}, indent=1))
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "x.zst").write_bytes(b"no zstd at all")
    (tmp_path / "cut.txt.zst").write_bytes(zstandard.compress(base64.b64encode(os.urandom(300_000)))[:-20])
    (tmp_path / "cut.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "x"}\n' * 99)[:-5])
    (tmp_path / "nul.bin").write_bytes(bytes(1000))
    write_text(tmp_path / "mixed" / "train" / "a.txt", [b"text"])
    (tmp_path / "mixed" / "more.txt").write_text("text")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-20])
    names = {"empty": "empty.txt", "no files": "folder", "bad.jsonl:2": "bad.jsonl", "--text-field": "field.jsonl"}
    names |= {"as parquet": "x.parquet", "complete": "cut.txt.gz", "cut.txt.zst: .* complete": "cut.txt.zst"}
    names |= {"cut.jsonl.zst: .* complete": "cut.jsonl.zst", "inputs are empty": "nul.bin"}
    names |= {"deep.jsonl:1: .*recursion": "deep.jsonl", "a JSON list, not an object": "list.json"}
    names |= {"pretty.json:1: .*one object per line.*--format txt": "pretty.json"}
    names |= {"is the file complete": "x.zst", "more.txt: without a split in the name": "mixed"}
    return {message: tmp_path / name for message, name in names.items()}


def test_bad_input_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    for message, path in broken_inputs(tmp_path).items():
        with pytest.raises(InputError, match=message) as caught:
            prepare([path], tmp_path / "data")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "data").exists()
        assert not list(tmp_path.glob(".data*"))


@pytest.mark.parametrize("split", [(0, 1, 1), (1, -1, 1), (1, 1), (1, float("nan"), 1)])
def test_bad_shares(tmp_path: Path, split: tuple[float, ...]) -> None:
    source = write_text(tmp_path / "a.txt", DOCUMENTS)
    with pytest.raises(UsageError, match="98/1/1"):
        prepare([source], tmp_path / "data", split=split)


def test_a_folder_in_use_is_not_replaced_unless_forced(tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.txt", DOCUMENTS)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    for force in (False, True):
        with pytest.raises(UsageError, match=r"not empty|not a data folder"):
            prepare([source], other, force=force)
    assert (other / "thesis.txt").read_text() == "precious"
    prepare([source], tmp_path / "data")
    with pytest.raises(UsageError, match="--force"):
        prepare([source], tmp_path / "data")
    prepare([write_text(tmp_path / "b.txt", DOCUMENTS[:5])], tmp_path / "data", force=True)
    assert everything(tmp_path / "data") == Counter(DOCUMENTS[:5])
    assert not list(tmp_path.glob(".data*"))


def test_inputs_and_outputs_that_would_harm_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_text(tmp_path / "in" / "a.txt", DOCUMENTS)
    prepare([source], tmp_path / "data")
    with pytest.raises(UsageError, match="contains the other"):
        prepare([tmp_path / "in"], tmp_path / "in" / "data")
    with pytest.raises(UsageError, match="contains the other"):
        prepare([tmp_path / "data" / "train-00000.bin"], tmp_path / "data", force=True)
    with pytest.raises(UsageError, match="is a data folder already"):
        prepare([tmp_path / "data"], tmp_path / "again")
    with pytest.raises(UsageError, match="no such file"):
        prepare([tmp_path / "missing"], tmp_path / "again")
    monkeypatch.chdir(tmp_path / "data")
    with pytest.raises(UsageError, match="current folder"):
        prepare([source], ".", force=True)
    assert everything(tmp_path / "data") == Counter(DOCUMENTS)


def test_a_link_is_followed(tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.txt", DOCUMENTS)
    prepare([source], tmp_path / "data")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    prepare([write_text(tmp_path / "b.txt", DOCUMENTS[:5])], tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert everything(tmp_path / "data") == Counter(DOCUMENTS[:5])


def test_the_old_folder_is_restored_if_the_new_one_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_text(tmp_path / "a.txt", DOCUMENTS)
    prepare([source], tmp_path / "data")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)  # a system that cannot exchange names
    with pytest.raises(OSError, match="No space"):
        prepare([source], tmp_path / "data", force=True)
    assert everything(tmp_path / "data") == Counter(DOCUMENTS)


def damage_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("splits"),
        lambda m: m.pop("groups"),
        lambda m: m.update(version="1"),
        lambda m: m["splits"].update(train=[]),
        lambda m: m["splits"]["train"].pop("shards"),
        lambda m: m["splits"]["train"]["groups"].update(a=3),
        lambda m: m["splits"]["train"]["shards"][0].update(bytes="many"),
        lambda m: m["splits"]["train"]["shards"][0].update(name="../elsewhere"),
    ],
)
def test_a_damaged_manifest(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    prepare([write_text(tmp_path / "a.txt", DOCUMENTS)], tmp_path / "data")
    damage_manifest(tmp_path / "data", change)
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        info(tmp_path / "data")


@pytest.mark.parametrize("part", ["offsets", "groups"])
def test_a_damaged_array(tmp_path: Path, part: str) -> None:
    prepare([write_text(tmp_path / "a.txt", DOCUMENTS)], tmp_path / "data")
    path = tmp_path / "data" / f"train-00000.{part}.npy"
    array = np.load(path)
    for broken in (array[:-1], array + 1, array.astype(np.float32)):
        np.save(path, broken)
        with pytest.raises(InputError, match="run `blt data prepare` again"):
            Dataset(tmp_path / "data").split("train")
    for content in (b"", b"not an array", path.read_bytes()[:-4]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            Dataset(tmp_path / "data").split("train")


def test_opening_a_path_that_is_no_data_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such data folder"):
        info(tmp_path / "missing")
    with pytest.raises(InputError, match="is not a data folder"):
        info(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "blt-data", "version": 99}')
    with pytest.raises(InputError, match="newer version"):
        info(tmp_path)


def test_a_manifest_nested_too_deeply_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(InputError, match="is not a data folder"):
        info(tmp_path)


def test_a_changed_or_missing_shard_is_found(tmp_path: Path) -> None:
    prepare([write_text(tmp_path / "a.txt", DOCUMENTS)], tmp_path / "data")
    shard = tmp_path / "data" / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(InputError, match="has changed"):
        Dataset(tmp_path / "data").verify()
    shard.write_bytes(bytes(content[:-1]))
    with pytest.raises(InputError, match="the manifest says"):
        Dataset(tmp_path / "data")
    shard.unlink()
    with pytest.raises(InputError, match="missing"):
        Dataset(tmp_path / "data")


def test_unknown_split_and_group(tmp_path: Path) -> None:
    prepare([write_text(tmp_path / "a.txt", DOCUMENTS)], tmp_path / "data")
    with pytest.raises(BltError, match="no split 'tset'"):
        Dataset(tmp_path / "data").split("tset")
    with pytest.raises(BltError, match="no group 'b'"):
        Dataset(tmp_path / "data").split("train").of_groups(["b"])
