"""Tensors on disk: both writers stream tensors of any kind, and every damaged file is one clear error."""

from __future__ import annotations

import json
import os
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blt.checkpoint import tensors
from blt.checkpoint.tensors import (
    StoredTensor,
    read_safetensors,
    read_tensors,
    stored_tensors,
    write_pickled,
    write_safetensors,
)
from blt_runtime.errors import CheckpointError

safetensors = pytest.importorskip("safetensors.torch")

TENSORS = {
    "pieces": StoredTensor(("a", "b"), (torch.randn(5, 3), torch.randn(4, 3))),
    "vector": StoredTensor(("v",), (torch.arange(7.0),)),
    "scalar": StoredTensor(("s",), (torch.tensor(2.5),)),
    "strided": StoredTensor(("t",), (torch.randn(4, 6).T,)),
    "none": StoredTensor(("n",), (torch.empty(0, 3),)),
}


def whole(tensor: StoredTensor) -> torch.Tensor:
    return torch.cat(tensor.pieces) if len(tensor.pieces) > 1 else tensor.pieces[0]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 40, 64 << 20])
def test_the_libraries_read_what_both_writers_write(
    block: int, dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "BLOCK", block)
    write_safetensors(tmp_path / "m.safetensors", TENSORS, dtype)
    write_pickled(tmp_path / "m.pt", {"format": "x", "n": 1}, {"state": TENSORS, "nothing": {}}, dtype)
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        assert archive.testzip() is None  # every checksum is right, those of the tensors too
        assert all(entry.CRC or not entry.file_size for entry in archive.infolist() if "/data/" in entry.filename)
    pickled = torch.load(tmp_path / "m.pt", weights_only=True)
    assert (pickled["format"], pickled["n"], pickled["nothing"]) == ("x", 1, {})
    for state in (safetensors.load_file(tmp_path / "m.safetensors"), pickled["state"]):
        assert state.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            want = whole(tensor).to(dtype or tensor.dtype)
            assert state[name].dtype == want.dtype
            assert torch.equal(state[name], want)


def test_tensors_stay_in_the_file_and_read_the_same_twice(tmp_path: Path) -> None:
    big = {"w": StoredTensor(("w",), (torch.randn(300, 1000),))}
    write_safetensors(tmp_path / "m.safetensors", big)
    write_pickled(tmp_path / "m.pt", {}, {"state": big})
    read = (
        read_safetensors(tmp_path / "m.safetensors"),
        stored_tensors(read_tensors(tmp_path / "m.pt")["state"], tmp_path / "m.pt"),
    )
    for found in read:
        assert found["w"].mapped
        for _ in range(2):  # pages are dropped after each read
            assert torch.equal(torch.cat(list(found["w"].blocks())), big["w"].pieces[0])


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pickled(tmp_path / "m.pt", {}, {"state": TENSORS})
    before = (tmp_path / "m.pt").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        write_pickled(tmp_path / "m.pt", {}, {"state": {}, "more": TENSORS})
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]
    assert (tmp_path / "m.pt").read_bytes() == before


@pytest.mark.parametrize("big", [1e6, -1e6])
def test_a_number_too_large_for_the_narrower_dtype_is_named(big: float, tmp_path: Path) -> None:
    weights = {"ours": StoredTensor(("theirs",), (torch.tensor([1.0, 65504.0, big]),))}
    with pytest.raises(CheckpointError, match=r"theirs has numbers beyond 6\.55e\+04, the largest float16"):
        write_pickled(tmp_path / "m.pt", {}, {"state": weights}, torch.float16)
    with pytest.raises(CheckpointError, match="theirs has numbers beyond"):
        write_safetensors(tmp_path / "m.safetensors", weights, torch.float16)
    assert not list(tmp_path.iterdir())
    write_safetensors(tmp_path / "m.safetensors", weights, torch.bfloat16)


@pytest.mark.parametrize("reader", [read_tensors, read_safetensors])
def test_a_folder_instead_of_a_file_is_not_reported_as_missing(
    reader: Callable[[Path], object], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"cannot read {tmp_path}: Is a directory"):
        reader(tmp_path)
    with pytest.raises(CheckpointError, match="nothing does not exist"):
        reader(tmp_path / "nothing")


def _header(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return edit


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated data": lambda data: data[:-4],
    "truncated header": lambda data: data[:20],
    "empty": lambda data: b"",
    "noise": lambda data: bytes(range(256)) * 4,
    "header longer than the file": lambda data: struct.pack("<Q", 1 << 40) + data[8:],
    "overlapping": _header(lambda h: h["b"].update(data_offsets=[8, 40])),
    "a hole": _header(lambda h: h["b"].update(data_offsets=[36, 68])),
    "beyond the end": _header(lambda h: h["b"].update(data_offsets=[32, 1 << 40])),
    "shape and bytes differ": _header(lambda h: h["b"].update(shape=[9])),
    "unknown dtype": _header(lambda h: h["b"].update(dtype="F33")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_safetensors_file_is_one_clear_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"a": StoredTensor(("a",), (torch.ones(8),)), "b": StoredTensor(("b",), (torch.ones(8),))})
    path.write_bytes(DAMAGE[name](path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"m\.safetensors is damaged or not a safetensors file") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)


def test_a_tensor_in_two_files_is_an_error(tmp_path: Path) -> None:
    for name in ("1", "2"):
        write_safetensors(tmp_path / name, {"twice": StoredTensor(("twice",), (torch.ones(1),))})
    with pytest.raises(CheckpointError, match="twice are in another file"):
        read_safetensors(tmp_path / "1", tmp_path / "2")


def test_a_file_of_the_other_endianness_is_read_in_memory(tmp_path: Path) -> None:
    """torch swaps the bytes in memory; pages of the file, read again, would hold other numbers."""
    want = torch.randn(300, 1000)
    torch.save({"w": want}, tmp_path / "native.pt")
    other = "big" if sys.byteorder == "little" else "little"
    with zipfile.ZipFile(tmp_path / "native.pt") as source, zipfile.ZipFile(tmp_path / "other.pt", "w") as target:
        for item in source.infolist():
            content = source.read(item)
            if item.filename.endswith("/byteorder"):
                content = other.encode()
            if item.filename.endswith("/data/0"):
                content = np.frombuffer(content, np.float32).byteswap().tobytes()
            target.writestr(item.filename, content)
    found = stored_tensors(read_tensors(tmp_path / "other.pt"), tmp_path / "other.pt")
    for _ in range(2):
        assert torch.equal(torch.cat(list(found["w"].blocks())), want)
