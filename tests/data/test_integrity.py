"""A shard that changed after preparation is found at the start of training, and looking costs nothing twice."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from blt.data import Dataset, integrity, prepare
from blt.train.config import load_config
from blt.train.setup import prepare_run
from blt_runtime.errors import InputError

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny-entropy.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_bytes(b"\0".join(b"some text %d" % i for i in range(200)))
    prepare([tmp_path / "a.txt"], tmp_path / "data", split=(8, 1, 1))
    return tmp_path / "data"


def replace(path: Path, content: bytes) -> None:
    """Other content of the same size, later."""
    assert len(content) == path.stat().st_size
    path.write_bytes(content)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that a check of train reads."""
    seen: list[str] = []

    def recorded(path: Path) -> str:
        seen.append(path.name)
        return sha256_of(path)

    with monkeypatch.context() as patch:
        patch.setattr(integrity, "sha256_of", recorded)
        Dataset(folder).check("train")
    return seen


sha256_of = integrity.sha256_of


def test_the_second_look_reads_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"train-00000.{part}" for part in ("bin", "offsets.npy", "groups.npy")]
    assert reads(folder, monkeypatch) == names
    assert reads(folder, monkeypatch) == []
    os.utime(folder / names[1], ns=(0, 1))
    assert reads(folder, monkeypatch) == names[1:2]
    assert reads(folder, monkeypatch) == []


@pytest.mark.parametrize("checked_before", [False, True])
def test_training_refuses_a_changed_shard(folder: Path, tmp_path: Path, checked_before: bool) -> None:
    config = load_config(CONFIG)
    if checked_before:
        prepare_run(config, tmp_path / "run", folder)
    path = folder / "train-00000.bin"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    replace(path, bytes(content))
    for _ in range(2):
        with pytest.raises(InputError, match=r"train-00000.bin has changed since it was prepared; run"):
            prepare_run(config, tmp_path / "run", folder)
    with pytest.raises(InputError, match="has changed"):
        Dataset(folder).verify()


def test_documents_that_end_elsewhere_are_noticed(folder: Path) -> None:
    path = folder / "train-00000.offsets.npy"
    offsets = np.load(path)
    offsets[1] += 1
    np.save(path, offsets)
    Dataset(folder).split("train")  # they fit the shard
    with pytest.raises(InputError, match=r"offsets.npy has changed"):
        Dataset(folder).check("train")


def test_verify_trusts_no_stamp(folder: Path) -> None:
    Dataset(folder).check("train", "valid", "test")
    path = folder / "test-00000.bin"
    time = path.stat().st_mtime_ns
    path.write_bytes(b"x" * path.stat().st_size)
    os.utime(path, ns=(time, time))
    Dataset(folder).check("test")
    with pytest.raises(InputError, match="has changed"):
        Dataset(folder).verify()


def test_damaged_stamps_and_folders_that_cannot_be_written_only_cost_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / integrity.STAMPS).write_text("[")
    assert reads(folder, monkeypatch)
    (folder / integrity.STAMPS).unlink()
    (folder / integrity.STAMPS).mkdir()  # a rename onto it fails, as in a folder that is read only
    assert reads(folder, monkeypatch)
    assert reads(folder, monkeypatch)
