"""The first bytes of a file decide its kind: text of any name is read, and nothing else becomes training text."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import sqlite3
import struct
import sys
import tarfile
import wave
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from blt.data import Dataset, prepare
from blt.data.magic import compression_of, not_text
from blt_runtime.errors import BackendError, InputError, UsageError

TEXT = "Some words, Wörter, mots.\n".encode() * 20


def everything(folder: Path) -> Counter[bytes]:
    dataset = Dataset(folder)
    splits = [dataset.split(name) for name in ("train", "valid", "test")]
    return Counter(split.bytes(index) for split in splits for index in range(len(split)))


def made(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def tar(file: io.BytesIO, format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(TEXT)
        archive.addfile(entry, io.BytesIO(TEXT))


def old_tar(file: io.BytesIO) -> None:
    """Without the word ustar, as tar wrote before 1988."""
    tar(file)
    header = bytearray(file.getvalue()[:512])
    header[257:512] = bytes(255)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    file.getbuffer()[:512] = bytes(header)


def zipped(file: io.BytesIO) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", TEXT)


def wav(file: io.BytesIO) -> None:
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 1, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(range(100)))


def png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


def database(folder: Path) -> bytes:
    connection = sqlite3.connect(folder / "x.db")
    connection.execute("create table a (b text)")
    connection.commit()
    connection.close()
    return (folder / "x.db").read_bytes()


def safetensors() -> bytes:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return struct.pack("<Q", len(header)) + header + bytes(4)


def foreign(folder: Path) -> dict[str, bytes]:
    """A part of the error message, and a file of that kind."""
    return {
        "a zip archive": made(zipped),
        "tar archive": made(tar),
        "a tar archive, compressed by gzip": gzip.compress(made(tar)),
        "a tar archive, compressed by zstd": zstandard.compress(made(old_tar)),
        "a tar archive, compressed by xz": lzma.compress(made(tar)),
        "by gzip a second time": gzip.compress(gzip.compress(TEXT)),
        "a PNG image": png(),
        "a JPEG image": b"\xff\xd8\xff\xe0\0\x10JFIF\0\1",
        "a GIF image": b"GIF89a\1\0\1\0\x80\0\0",
        "audio": made(wav),
        "an MP3": b"ID3\x04\0\0\0\0\0\0",
        "a PDF": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n",
        "an executable": Path(sys.executable).resolve().read_bytes()[:10_000],
        "bytecode": Path(sys.modules["json"].__cached__ or "").read_bytes()[:10_000],
        "an Arrow": b"ARROW1\0\0" + bytes(100),
        "a Feather": b"FEA1" + bytes([1, 0, 0, 0]) * 30,
        "an SQLite": database(folder),
        "a numpy array": made(lambda file: np.save(file, np.arange(9))),
        "a safetensors": safetensors(),
        "a Python pickle": pickle.dumps({"a": [1, 2]}),
        "a git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "UTF-16 text": "Text with mark".encode("utf-16"),
        "iconv -f UTF-16": "Text without a mark".encode("utf-16-be"),
        "UTF-32 text": "Text with mark".encode("utf-32"),
        "iconv -f UTF-32": "Text without a mark".encode("utf-32-le"),
        "binary data": np.random.default_rng(0).bytes(5000),
        "decompress it first": gzip.compress(b"PAR1" + bytes(20) + b"PAR1"),
    }


@pytest.mark.parametrize("name", ["notes.txt", "records.jsonl", "table.parquet", "plain"])
def test_what_is_not_text_is_refused_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    for number, (kind, content) in enumerate(foreign(tmp_path).items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(InputError) as caught:
            prepare([folder], tmp_path / "data")
        assert kind in str(caught.value)
        assert str(folder / name) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "data").exists()


def test_all_refused_files_are_named_at_once_and_text_can_be_forced(tmp_path: Path) -> None:
    kinds = foreign(tmp_path)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "fine.txt").write_bytes(TEXT)
    for number, content in enumerate(kinds.values()):
        (folder / f"{number:02d}.txt").write_bytes(content)
    with pytest.raises(InputError) as caught:
        prepare([folder], tmp_path / "data")
    message = str(caught.value)
    assert message.startswith(f"{len(kinds)} of {len(kinds) + 1} files cannot be read as text: {folder}/00.txt: a zip")
    assert "09.txt" in message
    assert f"; {len(kinds) - 10} more; nothing was written" in message
    assert len(message) < 2000
    prepare([folder], tmp_path / "data", format="txt", split=(1, 0, 0))
    assert png().split(b"\0")[0] in everything(tmp_path / "data")


@pytest.mark.parametrize(
    "text",
    [
        "Привет, мир. ".encode("cp1251"),
        "яблоко ясно".encode("koi8-r"),
        "日本語のテキスト".encode("shift-jis"),
        "中文文本".encode("gb18030"),
        "日本語".encode("iso2022_jp"),
        b"BMW and MZ and ORC and GIF89a and ID3 and FORM",
        b"070701 is a number, PACK is a word",
        b"RIFF raff, GGUF",
        b"\x1b[31mred\x1b[0m\r\n",
        b"one\0two\0three",
        b"BM\0MZ\0ORC and more",
        "\ufeffwith a mark of UTF-8".encode(),
        b"%!PS-Adobe",
        b"x",
        b"",
        ("a" * 65535 + "ä").encode(),  # the head ends inside a character
    ],
)
def test_text_in_any_ascii_based_encoding_is_text(text: bytes) -> None:
    assert not_text(text[: 1 << 16]) is None
    assert compression_of(text) is None


def test_compressions_are_read_by_their_first_bytes(tmp_path: Path) -> None:
    compressed = {
        "gzip": gzip.compress(TEXT),
        "zstd": zstandard.compress(TEXT),
        "xz": lzma.compress(TEXT),
        "lzma": lzma.compress(TEXT, format=lzma.FORMAT_ALONE),
        "bzip2": bz2.compress(TEXT),
    }
    for kind, content in compressed.items():
        assert compression_of(content) == kind
        for name in ("a.txt", "a", f"a.txt.{kind}", "a.txt.gz"):
            (tmp_path / name).write_bytes(content)
            prepare([tmp_path / name], tmp_path / "data", split=(1, 0, 0), force=True)
            assert everything(tmp_path / "data") == Counter([TEXT])
    for kind in ("gzip", "xz", "bzip2", "zstd"):  # several frames, with padding where the format has it
        padding = b"\0" * 4 if kind in ("gzip", "xz") else b""
        (tmp_path / "two").write_bytes(compressed[kind] * 2 + padding)
        prepare([tmp_path / "two"], tmp_path / "data", split=(1, 0, 0), force=True)
        assert everything(tmp_path / "data") == Counter([TEXT * 2])


def test_a_truncated_or_damaged_file_is_one_error(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "%d %s"}\n' % (i, bytes([65 + i * i % 26]) * (i % 40)) for i in range(20_000))
    for compress in (gzip.compress, bz2.compress, lzma.compress, zstandard.compress):
        whole = compress(lines)
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 255
        has_checksum = compress is not zstandard.compress
        for content in (whole[:20], whole[: len(whole) // 2], whole[:-3], *([bytes(damaged)] if has_checksum else [])):
            (tmp_path / "a.jsonl.gz").write_bytes(content)
            with pytest.raises(InputError, match=r"a.jsonl.gz: .*complete|a.jsonl.gz:\d+"):
                prepare([tmp_path / "a.jsonl.gz"], tmp_path / "data")
            assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl.gz"]


def test_a_compression_in_the_name_alone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(b"plain text")
    with pytest.raises(InputError, match="not compressed by gzip, unlike its name"):
        prepare([tmp_path / "a.txt.gz"], tmp_path / "data")
    prepare([tmp_path / "a.txt.gz"], tmp_path / "data", format="txt")
    assert everything(tmp_path / "data") == Counter([b"plain text"])


def test_lz4_names_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lz4.frame", None)
    (tmp_path / "a.txt").write_bytes(b"\x04\x22\x4d\x18" + bytes(20))
    with pytest.raises(BackendError, match="pip install lz4") as caught:
        prepare([tmp_path / "a.txt"], tmp_path / "data")
    assert caught.value.exit_code == 4


def test_a_zstd_file_with_a_long_window_names_the_memory_that_reads_it(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        3, window_log=29, enable_ldm=True, write_content_size=False
    )
    frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = frame.compress(b'{"text":"hi"}\n') + frame.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) + frame.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    with pytest.raises(InputError, match=r"window of 512M, more than --max-memory 256M; --max-memory 512M reads it"):
        prepare([tmp_path / "a.jsonl.zst"], tmp_path / "data")
    prepare([tmp_path / "a.jsonl.zst"], tmp_path / "data", max_memory=512 << 20)
    assert everything(tmp_path / "data") == Counter([b"hi"])


def test_files_that_describe_the_data_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "blt.data")
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("README.md", "LICENSE", "dataset_infos.json", "SHA256SUMS", ".gitattributes"):
        (folder / name).write_text("About the data.")
    (folder / "a.jsonl").write_text('{"text": "record"}\n')
    prepare([folder], tmp_path / "data")
    assert everything(tmp_path / "data") == Counter([b"record"])
    assert "left out, as it describes the data: LICENSE, README.md, SHA256SUMS, dataset_infos.json" in caplog.text
    assert "hidden entries left out: .gitattributes" in caplog.text
    (folder / "a.jsonl").rename(tmp_path / "a.jsonl")
    prepare([folder], tmp_path / "texts", split=(1, 0, 0), format="txt")
    assert everything(tmp_path / "texts") == Counter({b"About the data.": 4})
    prepare([tmp_path / "a.jsonl", folder / "README.md"], tmp_path / "named", split=(1, 0, 0))
    assert everything(tmp_path / "named") == Counter([b"record", b"About the data."])


def test_many_files_are_one_group_per_folder_unless_asked(tmp_path: Path) -> None:
    for number in range(60):
        path = tmp_path / "in" / ("a" if number % 2 else "b/c") / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text {number}")
    assert prepare([tmp_path / "in"], tmp_path / "auto")["groups"] == ["a", "b/c"]
    assert len(prepare([tmp_path / "in"], tmp_path / "file", group_by="file")["groups"]) == 60
    assert prepare([tmp_path / "in" / "a" / "1.txt"], tmp_path / "one", group_by="folder")["groups"] == ["a"]
    with pytest.raises(UsageError, match="--group-by"):
        prepare([tmp_path / "in"], tmp_path / "wrong", group_by="letter")
