"""Files that nobody has vouched for: plain files only, bounded, strict; and messages that quote them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from blt_runtime import reading
from blt_runtime.errors import BltError, nearest, printable, shown


@contextmanager
def quick() -> Iterator[None]:
    start = time.thread_time()
    yield
    assert time.thread_time() - start < 1


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, device])
def test_only_plain_files_are_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    for read in (reading.read_bytes, reading.read_text, reading.read_json, reading.read_array, reading.check_plain):
        with quick(), pytest.raises(OSError, match=r"not a plain file|Is a directory") as error:
            read(tmp_path / "x")
        assert reading.reason(error.value) in ("not a plain file", "Is a directory")


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 40)
    with quick(), pytest.raises(OSError, match="more than 16,777,216 bytes"):
        reading.read_json(tmp_path / "x")
    (tmp_path / "y").write_bytes(b"12345")
    assert reading.read_bytes(tmp_path / "y", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        reading.read_bytes(tmp_path / "y", 4)


def test_links_stay_in_the_folder_or_its_hub_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b/snapshots/1234"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    (tmp_path / "models--a--b/blobs/77").write_bytes(b"blob")
    (tmp_path / "secret").write_bytes(b"secret")
    (snapshot / "blob").symlink_to("../../blobs/77")
    (snapshot / "plain").write_bytes(b"plain")
    (snapshot / "inside").symlink_to("plain")
    os.link(snapshot / "plain", snapshot / "hard")
    (snapshot / "outside").symlink_to(tmp_path / "secret")
    for name in ("blob", "plain", "inside", "hard"):
        assert reading.in_folder(snapshot, name) == snapshot / name
    with pytest.raises(OSError, match="a link to a file outside its folder"):
        reading.in_folder(snapshot, "outside")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is there twice"),
        ("[NaN]", "'NaN' is not a finite number"),
        ("[-Infinity]", "not a finite number"),
        ("1e999", "not a finite number"),
        ("1" * 5000, "the whole number 11111111... has 5,000 digits"),
        ("[" * 65 + "]" * 65, "nested more than 64 levels"),
        ("[" * 200_000, "nested more than 64 levels"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested more than 64 levels"),
        ('["\\ud800"]', "surrogates"),
        ("[" + "1," * (1 << 20) + "1]", "more than 1,048,576 values"),
        ("[" + "{}," * (5 << 20) + "1]", "more than 1,048,576 values"),
        ('{"' + "x" * 1000 + '":1,"' + "x" * 1000 + '":1}', "is there twice"),
        (b"\xff", "utf-8"),
        ("", "Expecting value"),
    ],
)
def test_strict_json(text: str | bytes, message: str) -> None:
    with quick(), pytest.raises(ValueError) as error:
        reading.parse_json(text)
    assert message in str(error.value)
    assert len(str(error.value)) < 150


def test_json_that_is_fine() -> None:
    value = {"a": [1, -2.5, None, True, "\U0001f600"], "b": {"a": {}}, "n": (1 << 63) - 1, "t": "[{," * 10}
    assert reading.parse_json(json.dumps(value)) == value
    assert reading.parse_json("[NaN, Infinity]", finite=False)[1] == float("inf")
    deep = json.dumps("x")
    for _ in range(63):
        deep = f"[{deep}]"
    reading.parse_json(deep)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    "array",
    [np.arange(12, dtype=np.int16).reshape(3, 4), np.zeros((0, 5)), np.array(2.5), np.ones((2, 3), order="F")],
    ids=str,
)
def test_arrays(tmp_path: Path, array: np.ndarray, mapped: bool) -> None:
    np.save(tmp_path / "a.npy", array)
    found = reading.read_array(tmp_path / "a.npy", mapped=mapped)
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    assert isinstance(found, np.memmap) == (mapped and array.size > 0)


def npy(header: str, version: int = 1, data: bytes = b"", length: int | None = None) -> bytes:
    size = (len(header) if length is None else length).to_bytes(2 * version, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + header.encode() + data


def described(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\x01",
        b"\x93NUMPY\x03\x00" + bytes(100),
        b"PK\x03\x04" + bytes(100),
        npy("", length=65535),
        npy("", 2, length=(1 << 32) - 1),
        npy("(" * 9000, 1),
        npy(described("(1000000000000,)")),
        npy(described("(-1,)")),
        npy(described("(1,)", "'|O'"), data=bytes(8)),
        npy(described("(5,)", "'|V0'")),
        npy(described("(True,)"), data=bytes(4)),
        npy(described("(2,)"), data=bytes(7)),
        npy(described("(2,)"), data=bytes(9)),
        npy(described("(" + "0," * 200 + ")")),
        npy(described("(9" + "0" * 5000 + ",)")),
    ],
    ids=range(16),
)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_bad_array_is_one_quick_error(tmp_path: Path, content: bytes, mapped: bool) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with quick(), pytest.raises(ValueError) as error:
        reading.read_array(tmp_path / "a.npy", mapped=mapped)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def nested(levels: int) -> object:
    value: object = "x"
    for _ in range(levels):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    "value",
    [nested(60), {"a": nested(60)}, "y" * 10_000_000, b"z" * 10_000_000, 10**6000, [0] * 1_000_000, object()],
    ids=range(7),
)
def test_values_are_cut_before_they_become_text(value: object) -> None:
    with quick():
        text = shown(value)
    assert len(text) <= 63
    assert "0x" not in text


def test_small_values_are_whole() -> None:
    for value in (None, True, -3, 2.5, "a'b", [1, "x"], (1,), {"a": [2]}):
        assert shown(value).replace("(1)", "(1,)") == repr(value)


def test_control_characters_do_not_reach_a_message() -> None:
    text = "red \x1b[31m, \x9b, \x07, \u202e, \udc80, \r\n, \x7f end"
    error = str(BltError(f"{text} {shown(text)} {nearest(text, [text, 'a'])}"))
    assert error.isprintable()
    assert "\\x1b[31m" in error
    for plain in ("Größe 日本語　x", "a b"):
        assert printable(plain) == plain
    assert len(str(BltError("x" * 10_000_000))) < 4100
