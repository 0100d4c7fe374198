"""The recipe of `base`: the files of each Debian package that are text, and the share of them that is used.

A source turns a package's files into documents (group, language, key, text). Translations of one page have the same
key, so they are in the same split. Order, shares and caps are part of the recipe.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from blt.data.corpora.extract import catalogue_items, html_text, mallard_text

Files = Iterable[tuple[str, bytes]]
CODE = {"go": "go", "rs": "rust", "py": "python", "tcl": "tcl", "ts": "typescript"}
LONGEST_CODE = 200_000
LONGEST_TRANSLATION = 60
"""Characters; shorter messages of a game are labels."""


class Page(NamedTuple):
    """A document, before duplicates are dropped and long documents are cut."""

    group: str
    language: str
    key: str
    text: str


Source = Callable[[Files], Iterator[Page]]


def kept(key: str, percent: int) -> bool:
    """Whether a key is among a fixed `percent` of all keys."""
    return int.from_bytes(hashlib.sha256(b"keep" + key.encode()).digest()[:4], "big") % 100 < percent


def decode(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def office_help(language: str) -> Source:
    def read(files: Files) -> Iterator[Page]:
        for name, content in files:
            if name.endswith(".html") and "/text/" in name:
                key = "lohelp/" + name.split("/text/")[1]
                if kept(key, 40):
                    yield Page("lohelp", language, key, html_text(content))

    return read


def handbook(files: Files) -> Iterator[Page]:
    for name, content in files:
        found = re.match(r"usr/share/doc/debian-handbook/html/([\w-]+)/(.*\.html)$", name)
        if found:
            language = found[1] if found[1] in ("zh-CN", "zh-TW", "pt-BR") else found[1].split("-")[0]
            yield Page("handbook", language, "handbook/" + found[2], html_text(content))


def gnome_help(files: Files) -> Iterator[Page]:
    for name, content in files:
        found = re.match(r"usr/share/help/([\w@]+)/(.*\.page)$", name)
        if found:
            language = "en" if found[1] == "C" else found[1]
            yield Page("gnomehelp", language, "gnome/" + found[2], mallard_text(content))


def wesnoth(files: Files) -> Iterator[Page]:
    """The long messages of each catalogue, sorted by their English text; the English page is the union of all keys."""
    english: dict[str, set[str]] = {}
    for name, content in files:
        found = re.match(r"usr/share/games/wesnoth/[\d.]+/locale/([\w@]+)/LC_MESSAGES/(.*)\.mo$", name)
        if not found:
            continue
        items = sorted((k, v) for k, v in catalogue_items(content) if len(v) > LONGEST_TRANSLATION)
        if items:
            english.setdefault(found[2], set()).update(key for key, _ in items)
            yield Page("wesnoth", found[1], "wesnoth/" + found[2], "\n\n".join(value for _, value in items) + "\n")
    for catalogue, keys in english.items():
        text = "\n\n".join(sorted(key.split("^")[-1] for key in keys)) + "\n"
        yield Page("wesnoth", "en", "wesnoth/" + catalogue, text)


def anarchism(files: Files) -> Iterator[Page]:
    for name, content in files:
        if name.endswith((".md", ".md.gz")):
            yield Page("book", "en", "anarchism/" + name, decode(_unzipped(name, content)))


def endless_sky(files: Files) -> Iterator[Page]:
    for name, content in files:
        if name.endswith(".txt") and "/data/" in name:
            yield Page("story", "en", "endless/" + name, decode(content))


def python_docs(files: Files) -> Iterator[Page]:
    for name, content in files:
        skipped = any(part in name for part in ("genindex", "_modules", "/download"))
        if name.endswith(".html") and "/html/" in name and not skipped and kept(name, 60):
            yield Page("docs", "en", "pydoc/" + name.split("/html/")[1], html_text(content))


def linux_docs(files: Files) -> Iterator[Page]:
    for name, content in files:
        below = name.endswith((".rst.gz", ".rst", ".rst.txt", ".rst.txt.gz", ".txt.gz")) and "/rst" in name
        if below or name.endswith(".rst.gz"):
            yield Page("docs", "en", "linuxdoc/" + name, decode(_unzipped(name, content)))


def cpp_reference(files: Files) -> Iterator[Page]:
    for name, content in files:
        if name.endswith(".html") and kept(name, 12):
            yield Page("docs", "en", "cppref/" + name, html_text(content))


def fortunes(language: str) -> Source:
    def read(files: Files) -> Iterator[Page]:
        for name, content in files:
            if "/games/fortunes/" in name and not name.endswith((".dat", ".u8")) and b"\n%\n" in content:
                text = decode(content).replace("\n%\n", "\n\n")
                yield Page("quotes", language, f"fortunes-{language}/{name}", text)

    return read


def metamath(files: Files) -> Iterator[Page]:
    for name, content in files:
        if name.endswith("set.mm"):
            yield from _cut(decode(content), 200_000, "formal", "mm", "metamath")


def dictionary(files: Files) -> Iterator[Page]:
    for name, content in files:
        if name.endswith(".dict.dz"):
            yield from _cut(decode(gzip.decompress(content)), 100_000, "dict", "en", "gcide")


def code(pattern: str) -> Source:
    def read(files: Files) -> Iterator[Page]:
        for name, content in files:
            language = CODE.get(name.rsplit(".", 1)[-1])
            if language and re.search(pattern, name) and len(content) < LONGEST_CODE and b"\0" not in content[:4096]:
                yield Page("code", language, "code/" + name, decode(content))

    return read


def _unzipped(name: str, content: bytes) -> bytes:
    return gzip.decompress(content) if name.endswith(".gz") else content


def _cut(text: str, size: int, group: str, language: str, key: str) -> Iterator[Page]:
    for at in range(0, len(text), size):
        yield Page(group, language, f"{key}/{at}", text[at : at + size])


OFFICE = (
    "de", "fr", "es", "it", "pt", "pt-br", "ru", "pl", "cs", "nl", "sv", "fi", "hu", "el", "tr", "hi", "vi", "id", "ja",
    "ko", "zh-cn", "zh-tw", "km", "eu", "ca", "da", "et", "gl", "sl", "dz", "om", "en-us",
)  # fmt: skip
SOURCES: dict[str, Source] = {
    **{f"libreoffice-help-{name}": office_help("en" if name == "en-us" else name) for name in OFFICE},
    "debian-handbook": handbook,
    "gnome-user-docs": gnome_help,
    "wesnoth-1.16-data": wesnoth,
    "anarchism": anarchism,
    "endless-sky-data": endless_sky,
    "python3.11-doc": python_docs,
    "linux-doc-6.1": linux_docs,
    "cppreference-doc-en-html": cpp_reference,
    "fortunes": fortunes("en"),
    "fortunes-ru": fortunes("ru"),
    "fortunes-de": fortunes("de"),
    "metamath-databases": metamath,
    "dict-gcide": dictionary,
    "golang-1.19-src": code(r"/src/(?!vendor|cmd/vendor)"),
    "rust-src": code(r"/(library|compiler)/"),
    "libpython3.11-stdlib": code("."),
    "tcllib": code("."),
}
"""In the order in which they are read; of equal paragraphs, the first one is kept."""

CAPS = {
    ("lohelp", "*"): 2.0,
    ("docs", "en"): 22.0,
    ("dict", "en"): 8.0,
    ("formal", "mm"): 3.0,
    ("code", "go"): 8.0,
    ("code", "rust"): 8.0,
    ("code", "python"): 8.0,
    ("code", "tcl"): 2.0,
    ("gnomehelp", "*"): 0.6,
    ("handbook", "*"): 0.6,
    ("wesnoth", "*"): 0.6,
}
"""Megabytes of a group and language (`*`: each language) after which no further page of it is used."""
ENDS = {"metamath-databases": 3.0, "dict-gcide": 8.0, "rust-src": 8.0, "golang-1.19-src": 8.0, "tcllib": 2.0}
"""Megabytes of a page's group and language after which the rest of its package is not read."""
