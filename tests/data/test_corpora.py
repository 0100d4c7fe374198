"""Named corpora: text is deterministic, each rule of the recipe holds, and wrong packages are refused."""

from __future__ import annotations

import hashlib
import io
import lzma
import struct
import tarfile
from pathlib import Path
from typing import Literal

import pytest
import zstandard

from blt.data import Dataset
from blt.data.corpora import base, build, sources, tiny
from blt.data.corpora.extract import catalogue_items, html_text, mallard_text
from blt.data.corpora.packages import Package, find_packages, package_files, read_lock
from blt.data.corpora.text import Text
from blt_runtime.errors import InputError, UsageError


def package(path: Path, files: dict[str, bytes], compression: Literal["xz", "zst"] = "xz") -> Package:
    """Writes a Debian package with these files. Returns its line of a lock file."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    data = zstandard.compress(tar.getvalue()) if compression == "zst" else lzma.compress(tar.getvalue())
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": data}
    content = b"!<arch>\n"
    for name, member in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(member):<10}`\n".encode()
        content += header + member + b"\n" * (len(member) % 2)
    path.write_bytes(content)
    name, version, _ = path.name.split("_")
    return Package(name, version.replace("%3a", ":"), len(content), hashlib.sha256(content).hexdigest())


PARAGRAPHS = [f"Paragraph number {i} has enough characters to be counted as one." for i in range(12)]


def page(*paragraphs: str) -> bytes:
    body = "".join(f"<p>{text}</p>" for text in paragraphs)
    return f"<html><head><title>no</title></head><body><nav>menu</nav>{body}</body></html>".encode()


def office(name: str, text: bytes) -> tuple[str, bytes]:
    return f"usr/share/libreoffice/help/{name.split('/')[0]}/text/{name.split('/', 1)[1]}", text


def kept_names(count: int) -> list[str]:
    return [name for name in (f"p{i}.html" for i in range(count * 10)) if sources.kept(f"lohelp/{name}", 40)][:count]


@pytest.fixture
def debs(tmp_path: Path) -> tuple[Path, list[Package]]:
    folder = tmp_path / "debs"
    folder.mkdir()
    first, second = kept_names(2)
    german = dict([office(f"de/{first}", page(*PARAGRAPHS[:6])), office(f"de/{second}", page("kurz"))])
    english = dict([office(f"en/{first}", page(*PARAGRAPHS[4:], "x")), ("usr/share/doc/copyright", b"no")])
    lock = [
        package(folder / "libreoffice-help-de_4%3a1_all.deb", german),
        package(folder / "libreoffice-help-en-us_4%3a1_all.deb", english, "zst"),
    ]
    return folder, lock


def test_tiny_is_made_of_the_library_and_held_out_by_bytes(tmp_path: Path) -> None:
    manifest = build("tiny", tmp_path / "data")
    assert "json/decoder.py" in manifest["options"]["files"]
    assert not [
        name for name in manifest["options"]["files"] if name.startswith(("test/", "tkinter/", "site-packages/"))
    ]
    total = sum(split["bytes"] for split in manifest["splits"].values())
    assert total > 3_000_000
    for name in ("valid", "test"):
        assert 0.005 < manifest["splits"][name]["bytes"] / total < 0.04
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_docstrings_of_a_module_are_in_its_split(tmp_path: Path) -> None:
    library = tmp_path / "lib"
    (library / "json" / "tests").mkdir(parents=True)
    for name in ("abc.py", "json/tool.py", "json/tests/no.py", "_sysconfigdata_x.py", "own.py"):
        (library / name).write_text(f'"""{name} {"word " * 60}"""\ndef f():\n    """{"inner " * 50}"""\n')
    texts = list(tiny.texts(library)[0])
    assert texts == list(tiny.texts(library)[0])
    assert tiny.sources(library) == ["abc.py", "json/tool.py"]
    assert [text.group for text in texts] == ["code.python", "docs.en"] * 2
    assert b"inner" in texts[1].content
    assert b"def" not in texts[1].content
    assert texts[0].split == texts[1].split != texts[2].split == texts[3].split
    with pytest.raises(InputError, match="no sources"):
        tiny.texts(tmp_path / "nowhere")


def test_base_drops_known_paragraphs_and_keeps_translations_together(debs: tuple[Path, list[Package]]) -> None:
    folder, lock = debs
    texts, about = base.texts(folder, lock)
    first = kept_names(1)[0]
    split = base.split_of(f"lohelp/{first}")
    assert list(texts) == [
        Text(split, "lohelp.de", "\n\n".join([*PARAGRAPHS[:5], f"{PARAGRAPHS[5]}\n"]).encode()),
        Text(split, "lohelp.en", "\n\n".join([*PARAGRAPHS[6:], "x\n"]).encode()),
    ]
    assert about["packages"]["libreoffice-help-de"] == "4:1"


def test_base_as_a_data_folder(
    debs: tuple[Path, list[Package]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "read_lock", lambda: debs[1])
    monkeypatch.setattr(base, "split_of", lambda key: "train")
    build("base", tmp_path / "data", debs=debs[0])
    assert Dataset(tmp_path / "data").manifest["groups"] == ["lohelp.de", "lohelp.en"]
    build("base", tmp_path / "english", debs=debs[0], groups=["*.en"])
    english = Dataset(tmp_path / "english").manifest
    assert (english["groups"], english["options"]["only"]) == (["lohelp.en"], ["*.en"])
    with pytest.raises(UsageError, match=r"--groups quotes\.\*: matches none of lohelp\.de, lohelp\.en"):
        build("base", tmp_path / "none", debs=debs[0], groups=["*.en", "quotes.*"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "debs", "english"]


def test_long_pages_are_cut_at_paragraphs_and_caps_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"line {i} of a long help page that goes on and on and on" for i in range(1300)]
    names = kept_names(3)
    files = dict(office(f"de/{name}", page(*(f"{name} {line}" for line in lines))) for name in names)
    lock = [package(tmp_path / "libreoffice-help-de_1_all.deb", files)]
    texts = list(base.texts(tmp_path, lock)[0])
    assert len(texts) == 3 * 3
    assert all(base.LONG <= len(text.content) + 2 <= base.LONG + 100 for text in texts[:2])
    assert {text.split for text in texts} <= {"train", "valid", "test"}
    monkeypatch.setitem(sources.CAPS, ("lohelp", "*"), 0.1)
    assert (
        len(list(base.texts(tmp_path, lock)[0])) == 2 * 3
    )  # the page that exceeds the cap is complete; the next one is left out
    monkeypatch.setitem(sources.ENDS, "libreoffice-help-de", 0.01)
    assert len(list(base.texts(tmp_path, lock)[0])) == 3


def test_missing_and_changed_packages(debs: tuple[Path, list[Package]], tmp_path: Path) -> None:
    folder, lock = debs
    more = [*lock, Package("tcllib", "1.21+dfsg-1", 1, "0"), Package("fortunes", "1:1.99", 1, "0")]
    with pytest.raises(InputError, match=r"2 of 4 packages.*apt-get download tcllib=1.21\+dfsg-1 fortunes=1:1.99"):
        find_packages(folder, more)
    with pytest.raises(UsageError, match="--debs DIR"):
        build("base", tmp_path / "data")
    with pytest.raises(UsageError, match="no such folder"):
        build("base", tmp_path / "data", debs=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--debs belongs to"):
        build("tiny", tmp_path / "data", debs=folder)
    with pytest.raises(UsageError, match="did you mean 'tiny'"):
        build("tinny", tmp_path / "data")
    path = next(folder.glob("*-de_*"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match="not the package of the lock file"):
        find_packages(folder, lock)
    path.write_bytes(path.read_bytes()[:-300])
    for broken in (path, folder / "none.deb"):
        broken.touch()
        with pytest.raises(InputError, match="not a Debian package"):
            list(package_files(broken))
    assert not (tmp_path / "data").exists()


def test_the_lock_file_and_the_sources_name_the_same_packages() -> None:
    lock = read_lock()
    assert {entry.package for entry in lock} == set(sources.SOURCES)
    assert all(len(entry.sha256) == 64 and entry.size > 0 for entry in lock)


def test_text_of_html_and_mallard() -> None:
    content = b"<body><script>x</script><h1>A&amp;B\xc2\xb6</h1><p>one \n two<br/>three</p><pre>a  b\n  c</pre></body>"
    assert html_text(content) == "A&B\n\none two\n\nthree\n\na  b\nc\n"
    mallard = b"""<page xmlns="http://projectmallard.org/1.0/"><info><desc>no</desc></info><title>T</title>
        <p>one <em>two</em>\n three</p><section><title>S</title></section></page>"""
    assert mallard_text(mallard).split() == ["T", "one", "two", "three", "S"]
    assert mallard_text(b"<page>") == ""


@pytest.mark.parametrize("order", ["<", ">"])
def test_catalogues_of_either_byte_order(order: str) -> None:
    pairs = [(b"", b"header"), (b"ctx\x04key", b"W\xc3\xb6rter"), (b"one\0many", b"eins\0viele")]
    at, table, blob = 28 + 16 * len(pairs), b"", b""
    for column in (0, 1):
        for pair in pairs:
            table += struct.pack(f"{order}2I", len(pair[column]), at + len(blob))
            blob += pair[column] + b"\0"
    head = struct.pack(f"{order}7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    assert list(catalogue_items(head + table + blob)) == [("key", "Wörter"), ("one", "eins")]


def test_sources_of_the_other_packages() -> None:
    code = sources.SOURCES["golang-1.19-src"]
    files = [("usr/share/go/src/a.go", b"package a"), ("usr/share/go/src/vendor/b.go", b"x"), ("x/src/c.go", b"\0")]
    assert [found.key for found in code(files)] == ["code/usr/share/go/src/a.go"]
    (quotes,) = sources.SOURCES["fortunes"]([("usr/share/games/fortunes/x", b"a\n%\nb"), ("usr/share/games/y", b"")])
    assert quotes.text == "a\n\nb"
    handbook = [(f"usr/share/doc/debian-handbook/html/{name}/i.html", page("t")) for name in ("de-DE", "pt-BR")]
    assert [found.language for found in sources.handbook(handbook)] == ["de", "pt-BR"]
    assert [found.language for found in sources.gnome_help([("usr/share/help/C/a/b.page", b"<page/>")])] == ["en"]
    (whole, rest) = sources.metamath([("usr/share/metamath/set.mm", b"m" * 200_001)])
    assert (len(whole.text), rest.text) == (200_000, "m")
