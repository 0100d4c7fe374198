"""Records of prompt and completion: one document each, and the prompt carries no loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blt.data import BatchShape, Dataset, Loader, prepare
from blt_runtime.errors import InputError, UsageError
from blt_runtime.ids import EOS, OFFSET

RECORDS = [
    {"prompt": "2 + 2 = ", "completion": "4"},
    {"prompt": "ä", "completion": "umlaut, two bytes in front"},
    {"prompt": "", "completion": "nothing asked"},
    {"prompt": "nothing said", "completion": ""},
    {"prompt": "", "completion": ""},
    {"prompt": "2 + 2 = ", "completion": "four"},
]


def written(folder: Path, records: list[dict[str, str]] = RECORDS) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepared(folder: Path, records: list[dict[str, str]] = RECORDS, **options: Any) -> Path:
    keys: dict[str, Any] = {"prompt_field": "prompt", "completion_field": "completion", "split": (1, 0, 0), **options}
    prepare([written(folder, records)], folder / "data", **keys)
    return folder / "data"


def test_a_record_is_one_document_with_its_prompts_length(tmp_path: Path) -> None:
    documents = Dataset(prepared(tmp_path, shard_bytes=30)).split("train")
    kept = [record for record in RECORDS if record["prompt"] + record["completion"]]  # an empty document is none
    assert [documents.bytes(i) for i in range(len(documents))] == [
        (record["prompt"] + record["completion"]).encode() for record in kept
    ]
    assert documents.prompt_lengths.tolist() == [len(record["prompt"].encode()) for record in kept]


def test_prompts_are_no_targets_and_every_other_token_is_one(tmp_path: Path) -> None:
    documents = Dataset(prepared(tmp_path)).split("train")
    loader = Loader(documents, BatchShape(rows=2, buckets=(16,)), seed=0, shuffle=False)
    learned = np.concatenate([batch.targets[batch.mask] for batch in loader.one_pass()])
    text = bytes((learned[learned >= OFFSET] - OFFSET).astype(np.uint8))
    assert sorted(text) == sorted("".join(record["completion"] for record in RECORDS).encode())
    assert (learned == EOS).sum() == len(documents)


def test_plain_text_has_no_prompts_and_no_file_for_them(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("a\0bc")
    prepare([tmp_path / "plain.txt"], tmp_path / "data", split=(1, 0, 0))
    assert Dataset(tmp_path / "data").split("train").prompt_lengths.tolist() == [0, 0]
    assert not list((tmp_path / "data").glob("*.prompts.npy"))


def test_records_of_one_prompt_stay_in_one_split(tmp_path: Path) -> None:
    records = [{"prompt": f"question {i % 40}: ", "completion": f"answer {i}"} for i in range(200)]
    dataset = Dataset(prepared(tmp_path, records, split=(60, 20, 20)))
    seen = []
    for name in ("train", "valid", "test"):
        documents = dataset.split(name)
        prompts = {documents.bytes(i)[: documents.prompt_lengths[i]] for i in range(len(documents))}
        assert prompts
        seen.append(prompts)
    assert sum(map(len, seen)) == len(set().union(*seen)) == 40


def test_dedup_distinguishes_prompts(tmp_path: Path) -> None:
    records = [{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bc"}] * 2
    assert Dataset(prepared(tmp_path, records, dedup=True)).split("train").prompt_lengths.tolist() == [2, 1]


def test_shards_are_distinguished_by_their_prompts(tmp_path: Path) -> None:
    found = []
    for i, record in enumerate([{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bc"}]):
        (tmp_path / str(i)).mkdir()
        found.append(Dataset(prepared(tmp_path / str(i), [record])).split("train"))
    assert found[0].bytes(0) == found[1].bytes(0)
    assert found[0].sha256 != found[1].sha256
    assert found[0].text_sha256 == found[1].text_sha256


def test_damaged_prompts_are_found(tmp_path: Path) -> None:
    folder = prepared(tmp_path)
    path = folder / "train-00000.prompts.npy"
    lengths = np.load(path)
    np.save(path, lengths[::-1] + 50)
    with pytest.raises(InputError, match="does not fit its shard"):
        Dataset(folder).split("train")
    path.unlink()
    with pytest.raises(InputError, match="missing"):
        Dataset(folder)


def test_invalid_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="belong together"):
        prepared(tmp_path, completion_field=None)
    with pytest.raises(InputError, match=r"pairs.jsonl:1: no text under the key 'question'.*--prompt-field"):
        prepared(tmp_path, prompt_field="question")
    (tmp_path / "notes.txt").write_text("no fields at all")
    keys: dict[str, Any] = {"prompt_field": "prompt", "completion_field": "completion"}
    with pytest.raises(UsageError, match=r"notes.txt is read as text.*--prompt-field"):
        prepare([tmp_path / "pairs.jsonl", tmp_path / "notes.txt"], tmp_path / "data", **keys)
    with pytest.raises(UsageError, match=r"pairs.jsonl is read as text"):
        prepare([tmp_path / "pairs.jsonl"], tmp_path / "data", format="txt", **keys)
    assert not (tmp_path / "data").exists()
