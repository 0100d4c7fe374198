"""A GGUF header is read within the bounds of the file, whatever it claims."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blt.checkpoint.gguf_file import GGUFFile

BLOCKS = {0: (1, 4), 2: (32, 18)}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def field(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def array(inner: int, length: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", inner, length) + values


def tensor(name: str, sizes: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def file(fields: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), **counts: Any) -> bytes:
    start = struct.pack("<4sIQQ", b"GGUF", counts.get("version", 3), counts.get("n_tensors", len(tensors)),
                        counts.get("n_fields", len(fields)))  # fmt: skip
    head = start + b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + counts.get("data", b"")


BAD = {
    "nothing": (b"", "empty"),
    "other": (b"GGML" + bytes(40), "does not begin"),
    "version": (file(version=9), "does not begin"),
    "cut": (file()[:10], "claims"),
    "tensors": (file(n_tensors=1 << 60), "claims 1,152,921,504,606,846,976 tensors"),
    "fields": (file(n_fields=1 << 60), "fields"),
    "a long string": (file((field("a", 8, struct.pack("<Q", 1 << 60)),)), "a string of"),
    "a long array": (file((field("a", 9, array(0, 1 << 60)),)), "claims"),
    "many strings": (file((field("a", 9, array(8, 1 << 60)),)), "strings"),
    "strings without end": (file((field("a", 9, array(8, 1 << 20, struct.pack("<Q", 1 << 50))),)), "claims"),
    "nested arrays": (file((field("a", 9, array(9, 1)),)), "unsupported type 9"),
    "an unknown type": (file((field("a", 77, b""),)), "unknown type 77"),
    "a field twice": (file((field("a", 4, bytes(4)),) * 2), "there twice"),
    "no text": (file((field("a", 8, string(b"\xff")),)), "utf-8"),
    "alignment": (file((field("general.alignment", 4, bytes(4)),)), "alignment"),
    "axes": (file((), (string("t") + struct.pack("<I", 1 << 31),)), "axes"),
    "sizes": (file((), (tensor("t", (1 << 40, 1 << 40)),)), "its tensors claim"),
    "an offset": (file((), (tensor("t", (1,), offset=1 << 62),), data=bytes(4)), "its tensors claim"),
    "shared bytes": (
        file((), tuple(tensor(f"t{i}", (1000,)) for i in range(40)), data=bytes(4000)),
        "its tensors claim",
    ),
    "an unknown tensor type": (file((), (tensor("t", (1,), kind=99),)), "do not exist"),
    "half a block": (file((), (tensor("t", (33,), kind=2),)), "do not exist"),
    "a tensor twice": (file((), (tensor("t", (1,)),) * 2, data=bytes(8)), "there twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_header_that_claims_too_much_is_one_quick_error(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    (tmp_path / "m.gguf").write_bytes(content)
    start = time.thread_time()
    with pytest.raises(ValueError) as error:
        GGUFFile(tmp_path / "m.gguf", BLOCKS)
    assert time.thread_time() - start < 0.5
    assert message in str(error.value)


def test_what_the_library_writes(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_uint32("llama.block_count", 7)
    writer.add_bool("flag", True)
    writer.add_tensor("w", weights)
    writer.add_tensor("h", weights.astype(np.float16))
    writer.add_tensor("q", gguf.quants.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q8_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = GGUFFile(tmp_path / "m.gguf", gguf.GGML_QUANT_SIZES)
    assert read.fields["general.architecture"] == "llama"
    assert (read.fields["llama.block_count"], read.fields["flag"], read.fields["some.numbers"]) == (7, True, None)
    for name in ("w", "h"):
        np.testing.assert_array_equal(read.read(read.tensors[name], gguf), weights)
    np.testing.assert_allclose(read.read(read.tensors["q"], gguf), np.ones((2, 64)), rtol=1e-2)
