"""Long lines of JSON are read in blocks, with the result of `json`, and documents of any length in bounded memory."""

from __future__ import annotations

import gzip
import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from blt.data import Dataset, prepare
from blt.data.long_lines import LongLine
from blt_runtime.errors import InputError

REPO = Path(__file__).resolve().parents[2]
KEYS = (("text",), ("meta", "text"))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blt.data.long_lines.BLOCK_BYTES", 7)
    monkeypatch.setattr("blt.data.records.LONG_LINE", 5)
    monkeypatch.setattr("blt.data.records.LONG_BYTES", 20)


class Text:
    def __init__(self) -> None:
        self.content = b""

    def append(self, content: bytes) -> None:
        self.content += content


def read(line: bytes, begin: int) -> dict[tuple[str, ...], Any]:
    found = LongLine(line[:begin], io.BytesIO(line[begin:])).read(KEYS, Text)
    return {key: value.content.decode() if isinstance(value, Text) else value for key, value in found.items()}


def some_value(draw: random.Random, depth: int = 0) -> Any:
    kind = draw.randrange(9 if depth < 4 else 6)
    if kind < 3:
        return "".join(draw.choices('ab"\\/\n\t\b\x00äß日😀{}[]:, ', k=draw.randrange(30)))
    if kind < 6:
        return draw.choice([None, True, False, 0, -1.5e9, 12345678901234567890])
    if kind == 6:
        return [some_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    names = ["text", "meta", "other", "ä", 'q"']
    return {name: some_value(draw, depth + 1) for name in draw.sample(names, draw.randrange(5))}


@pytest.mark.usefixtures("small_blocks")
def test_the_result_is_that_of_json() -> None:
    draw = random.Random(0)
    for number in range(1500):
        record = {name: some_value(draw, 1) for name in draw.sample(["text", "meta", "x"], 3)}
        line = json.dumps(record, ensure_ascii=number % 2 == 0, indent=None).encode() + b"\n" * (number % 3 != 0)
        found = read(line, draw.randrange(8))
        for path in KEYS:
            expected: Any = record
            for name in path:
                expected = (
                    expected.get(name, "missing")
                    if isinstance(expected, dict)
                    else expected
                    if expected is None
                    else "missing"
                )
            if isinstance(expected, str) and expected != "missing":
                assert found[path] == expected
            elif expected is None:
                assert found[path] is None
            else:
                assert found.get(path, "missing") in ("missing", "another kind of value")


def some_value_of(text: str) -> bytes:
    return json.dumps({"text": text}).encode()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("text", ["😀" * 50, "\ud83d" * 30 + "😀", "é\\" * 20, "", "\ud83dx\ude00"])
def test_escapes_across_blocks(text: str) -> None:
    for begin in range(12):
        expected = text.encode("utf-8", "ignore").decode()
        assert read(some_value_of(text), begin)[("text",)] == expected


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "line",
    [
        b'["text"]', b'{"text": "a"', b'{"text": "a', b'{"text": "a"} {}', b'{"text": "a" "b": 1}', b'{"text" "a"}',
        b'{"text": "a", "text": "b"}', b'{"meta": {"text": "a"}, "meta": {"text": "b"}}', b'{"text": "\\x"}',
        b'{"text": "\xff"}', b'{"text": "a\tb"}', b'{text: 1}', b'{"a": [1, 2', b'{"a": }', b'{"text": "\\u12"}',
        b'{"text": "a",}', b'{"text": "\xc3"}',
    ],
)  # fmt: skip
def test_what_is_not_one_object_is_an_error(line: bytes) -> None:
    for begin in (1, len(line)):
        with pytest.raises(ValueError, match=r"\w"):
            read(line, begin)


@pytest.mark.usefixtures("small_blocks")
def test_long_records_are_documents(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [
        {"meta": {"p": "question " * i, "x": [{}]}, "c": "answer " * i if i % 5 else None, "more": ["}"]}
        for i in range(1, 20)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n\n" for record in records))
    keys: dict[str, Any] = {"prompt_field": "meta.p", "completion_field": "c"}
    prepare([tmp_path / "a.jsonl"], tmp_path / "data", split=(1, 0, 0), **keys)
    documents = Dataset(tmp_path / "data").split("train")
    kept = [i for i in range(1, 20) if i % 5]
    assert [documents.bytes(i).decode() for i in range(len(documents))] == [
        "question " * i + "answer " * i for i in kept
    ]
    assert list(documents.prompt_lengths) == [9 * i for i in kept]
    assert "3 records of null text: skipped" in caplog.text
    with pytest.raises(InputError, match=r"a.jsonl:1: no text under the key 'texts'"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "wrong", text_field="texts")
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"text": "not closed\n')
    with pytest.raises(InputError, match=r"b.jsonl:2: not a JSON object"):
        prepare([tmp_path / "b.jsonl"], tmp_path / "wrong")


@pytest.mark.usefixtures("small_blocks")
def test_long_documents_are_cut_and_moved(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 1000)
    prepare([tmp_path / "a.txt"], tmp_path / "data", dedup=True)
    splits = [Dataset(tmp_path / "data").split(name) for name in ("train", "valid", "test")]
    assert b"".join(split.bytes(0) for split in splits) == b"some words\n" * 1000


def bombs(folder: Path) -> dict[str, Path]:
    """Small files that expand to much text."""
    size = 200 << 20
    compressor = zstandard.ZstdCompressor().compressobj()
    with (folder / "text.zst").open("wb") as file:
        for _ in range(size >> 20):
            file.write(compressor.compress(b"a" * (1 << 20)))
        file.write(compressor.flush())
    with gzip.open(folder / "line.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"lists": [' + b"[]," * (1 << 21) + b'0], "text": "' + b"a" * (80 << 20) + b'"}\n')
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"text": ["a" * (1 << 20)] * 200}), folder / "rows.parquet", dictionary_pagesize_limit=1 << 30
    )
    return {"text": folder / "text.zst", "line": folder / "line.jsonl.gz", "rows": folder / "rows.parquet"}


def test_memory_is_bounded_whatever_a_file_expands_to(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from blt.data import prepare\n"
        "prepare([sys.argv[1]], sys.argv[2], split=(1, 0, 0))\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    )
    for name, path in bombs(tmp_path).items():
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(tmp_path / name)],
            env={"PYTHONPATH": f"{REPO}:{REPO / 'runtime'}"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        most = 400 if name == "rows" else 250  # MB; pyarrow alone has 100
        assert int(done.stdout) < most << 10, f"{name}: {done.stdout} kB"
        assert Dataset(tmp_path / name).split("train").n_bytes >= 80 << 20
