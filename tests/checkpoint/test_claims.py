"""A file that claims more than it holds is refused at once; what is only laid out differently still loads."""

from __future__ import annotations

import _codecs
import json
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blt.checkpoint import claims
from blt.checkpoint.formats import open_source
from blt.checkpoint.models import load, save
from blt.checkpoint.source import shapes
from blt.checkpoint.tensors import read_safetensors, read_tensors, stored_tensors
from blt.model.config import BLTConfig
from blt_runtime.errors import CheckpointError
from tests.tiny import tiny

ONE = torch.zeros(1)


class Call:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def refused(path: Path, read: Callable[[Path], Any]) -> str:
    """The message; reading takes under a second and 100 MB."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(CheckpointError) as error:
        read(path)
    assert time.thread_time() - start < 3  # under a second on an idle core
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert len(str(error.value)) < 1000
    assert str(error.value).isprintable()
    return str(error.value)


def read_state(path: Path) -> Any:
    return stored_tensors(read_tensors(path)["blt"], path)


STATES: dict[str, tuple[Any, str]] = {
    "strides of 0": (ONE.expand(1 << 20, 1 << 12), "by its strides"),
    "one stride of 0": (torch.zeros(8, 1).expand(8, 1 << 20), "by its strides"),
    "overlapping windows": (torch.zeros(4096).unfold(0, 2048, 1), "by its strides"),
    "shared": ([torch.zeros(4096)] * 50, "share their bytes"),
    "parts of one": (list(torch.zeros(4096).expand(1, 4096)) * 50, "share their bytes"),
    "memory from a number": (Call(bytearray, 10**10), "bytearray"),
    "a slow encoding": (Call(_codecs.encode, "\xfc" * 10**6, "punycode"), "calls _codecs encode"),
    "instructions": ([[]] * (1 << 20), "instructions"),
    "names": ({1: ONE}, "which is no text"),
    "a negated view": (torch.zeros(2, dtype=torch.complex64).conj().imag, "negated"),
}


@pytest.mark.parametrize("name", STATES)
def test_pickles_that_claim_more_than_they_hold(name: str, tmp_path: Path) -> None:
    value, message = STATES[name]
    tensors = isinstance(value, list) and isinstance(value[0], torch.Tensor)
    state = {str(i): t for i, t in enumerate(value)} if tensors else value if isinstance(value, dict) else {"a": value}
    torch.save({"blt": state}, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").stat().st_size < 4 << 20
    assert message in refused(tmp_path / "model.pt", read_state)


def test_a_model_of_one_number(tmp_path: Path) -> None:
    save(tmp_path / "model.pt", tiny("static"))
    held = torch.load(tmp_path / "model.pt", weights_only=True)
    held["config"]["blt"]["latent"]["ffn_dim"] = 1 << 22
    config = BLTConfig.model_validate(held["config"]["blt"])

    held["blt"] = {name: ONE.as_strided(shape, (0,) * len(shape)) for name, shape in shapes(config).items()}
    torch.save(held, tmp_path / "bad.pt")
    assert "by its strides" in refused(tmp_path / "bad.pt", open_source)


def rewrite(path: Path, compression: int, **contents: bytes) -> None:
    """The archive with other contents, compressed."""
    with zipfile.ZipFile(path) as old:
        held = {info.filename: old.read(info) for info in old.infolist()}
    folder = next(iter(held)).split("/")[0]
    held |= {f"{folder}/{name.replace('__', '.')}": content for name, content in contents.items()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in held.items():
            new.writestr(name, content)


def test_compressed_archives(tmp_path: Path) -> None:
    torch.save({"blt": {"a": ONE}}, tmp_path / "m.pt")
    rewrite(tmp_path / "m.pt", zipfile.ZIP_DEFLATED, extra=bytes(200 << 20))
    assert (tmp_path / "m.pt").stat().st_size < 1 << 20
    assert "is compressed" in refused(tmp_path / "m.pt", read_tensors)


def test_a_large_directory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"")
        archive.comment = b"x"
    data = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(data.replace(b"PK\x05\x06", bytes(5 << 20) + b"PK\x05\x06"))
    with (tmp_path / "m.pt").open("r+b") as file:
        at = file.read().index(b"PK\x05\x06")
        file.seek(at + 12)
        file.write(struct.pack("<I", 5 << 20))
    refused(tmp_path / "m.pt", read_tensors)


def test_a_large_pickle(tmp_path: Path) -> None:
    torch.save({"blt": {"a": ONE}, "text": "x" * (17 << 20)}, tmp_path / "m.pt")
    assert "data.pkl' has" in refused(tmp_path / "m.pt", read_tensors)


def test_an_older_file_with_many_instructions(tmp_path: Path) -> None:
    torch.save({"blt": {"a": [[]] * (1 << 20)}}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    assert "instructions" in refused(tmp_path / "m.pt", read_tensors)


@pytest.mark.parametrize("zipped", [True, False])
def test_other_layouts_still_load(tmp_path: Path, zipped: bool) -> None:
    whole = torch.randn(6, 8)
    state = {
        "transposed": whole.T,
        "tied": whole,
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "rows": torch.randn(10, 4)[2:5],
        "columns": torch.randn(4, 10)[:, 2:5],
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 7),
        "one row": torch.randn(1, 5).expand(1, 5),
    }
    torch.save({"blt": state}, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    found = read_state(tmp_path / "m.pt")
    for name, tensor in state.items():
        assert torch.equal(torch.cat(list(found[name].blocks())).reshape(tensor.shape), tensor.detach())


def test_transposed_weights_of_a_model_load(tmp_path: Path) -> None:
    made = tiny("static")
    save(tmp_path / "model.pt", made)
    held = torch.load(tmp_path / "model.pt", weights_only=True)
    held["blt"] = {name: t.T.contiguous().T if t.ndim == 2 else t for name, t in held["blt"].items()}
    torch.save(held, tmp_path / "turned.pt")
    first, second = (load(tmp_path / name).require_blt()[0].state_dict() for name in ("model.pt", "turned.pt"))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])


def header(text: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


HEADERS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "its header claims 0 of 0 bytes"),
    "a long header": (header("{}", length=1 << 60), "its header claims"),
    "no JSON": (header("[[["), "not a safetensors file"),
    "a list": (header("[]"), "no object"),
    "a name twice": (
        header('{"a":%s,"a":%s}' % ((json.dumps(entry([1], 0, 4)),) * 2), bytes(4)),
        "the key 'a' is there twice",
    ),
    "more than the file": (header(json.dumps({"a": entry([1 << 40], 0, 4 << 40)})), "damaged"),
    "the same bytes": (header(json.dumps({str(i): entry([1024], 0, 4096) for i in range(9)}), bytes(4096)), "damaged"),
    "many tensors": (
        header(json.dumps({str(i): entry([0], 0, 0) for i in range(claims.MOST_TENSORS + 1)})),
        "more than 20,000",
    ),
    "many values": (header('{"a":[' + "0," * (1 << 20) + "0]}"), "more than 1,048,576 values"),
    "escapes in a name": (header(json.dumps({"\x1b[31m": entry([9], 0, 4)}), bytes(4)), "damaged"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_that_claim_more_than_they_hold(name: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    content, message = HEADERS[name]
    (tmp_path / "m.safetensors").write_bytes(content)
    assert message in refused(tmp_path / "m.safetensors", read_safetensors)


def test_a_link_to_another_folder_is_not_read(tmp_path: Path) -> None:
    save(tmp_path / "model.pt", tiny("static"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run/model.pt").symlink_to("../model.pt")
    with pytest.raises(CheckpointError, match="a link to a file outside its folder"):
        open_source(tmp_path / "run")
    assert open_source(tmp_path / "run/model.pt").blt is not None  # the user named the link
