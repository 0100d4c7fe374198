"""Records of JSONL: null texts are skipped and counted, keys may be nested, and no key occurs twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from blt.data import Dataset, prepare
from blt_runtime.errors import InputError


def contents(path: Path, *lines: str, **options: str | bool) -> Counter[bytes]:
    """The documents of these lines."""
    (path / "a.jsonl").write_text("\n".join(lines))
    prepare([path / "a.jsonl"], path / "data", split=(1, 0, 0), force=True, **options)  # type: ignore[arg-type]
    documents = Dataset(path / "data").split("train")
    return Counter(documents.bytes(i) for i in range(len(documents)))


def test_null_texts_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = ('{"text": "a"}', '{"text": ""}', '{"text": null}')
    assert contents(tmp_path, *lines) == Counter([b"a"])
    assert f"1 record of null text: skipped (first: {tmp_path}/a.jsonl:3)" in caplog.text
    with pytest.raises(InputError, match=r"a\.jsonl:3: null text"):
        contents(tmp_path, *lines, strict=True)


def test_a_missing_text_is_an_error(tmp_path: Path) -> None:
    for line in ('{"other": "a"}', '{"text": 1}', '{"text": ["a"]}'):
        with pytest.raises(InputError, match="no text under the key 'text'; name the right key with --text-field"):
            contents(tmp_path, line)


def test_nested_keys(tmp_path: Path) -> None:
    lines = ('{"meta": {"text": "a"}}', '{"meta.text": "b", "meta": {"text": "c"}}', '{"meta": null}')
    assert contents(tmp_path, *lines, text_field="meta.text") == Counter([b"a", b"b"])
    for line in ('{"meta": {}}', '{"meta": "text"}', '{"meta": {"text": {}}}'):
        with pytest.raises(InputError, match=r"no text under the key 'meta\.text'"):
            contents(tmp_path, line, text_field="meta.text")


def test_a_key_that_occurs_twice_in_one_object_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.jsonl:2: the key 'text' occurs twice in one object"):
        contents(tmp_path, '{"text": "a"}', '{"text": "b", "text": "c"}')
    assert contents(tmp_path, '{"text": "a", "more": {"text": "b"}}', '{"text": "text"}') == Counter([b"a", b"text"])
