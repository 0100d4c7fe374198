"""Text of the formats that Debian packages carry: HTML, Mallard pages, gettext catalogues.

These functions define the corpus, so even their simplifications must not change.
"""

from __future__ import annotations

import html.parser
import re
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

_BLOCK = (
    "p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "tr", "pre", "section", "article", "table", "ul",
    "ol", "br", "blockquote", "td", "th", "figure", "note", "title", "item", "list", "page", "info", "steps", "terms",
    "links", "media", "cite", "comment",
)  # fmt: skip
_SKIPPED = (
    "script", "style", "head", "nav", "header", "footer", "aside", "noscript", "button", "svg", "form", "math",
)  # fmt: skip
_MALLARD_SKIPPED = ("info", "media", "links")
_MALLARD_OPENS = ("p", "title", "item", "section", "screen", "td")
_MALLARD_CLOSES = ("p", "title", "item", "screen")
_LITTLE_ENDIAN = b"\xde\x12\x04\x95"


class _TextParser(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.out: list[str] = []
        self._skipped = self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipped += tag in _SKIPPED
        self._preformatted += tag == "pre"
        if tag in _BLOCK:
            self.out.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIPPED and self._skipped:
            self._skipped -= 1
        if tag == "pre" and self._preformatted:
            self._preformatted -= 1
        if tag in _BLOCK:
            self.out.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.out.append(data if self._preformatted else re.sub(r"\s+", " ", data))


def html_text(content: bytes) -> str:
    """The text of a page without navigation, scripts and forms; empty lines separate its blocks."""
    parser = _TextParser()
    try:
        parser.feed(content.decode("utf-8", "replace"))
        parser.close()
    except AssertionError:
        return ""
    text = "".join(parser.out).replace("\u00b6", "").replace("\u00a0", " ")
    text = re.sub(r"\n[ \t]+(?=\S)", "\n", re.sub(r"[ \t]+\n", "\n", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def mallard_text(content: bytes) -> str:
    """The text of a page of GNOME's help; empty if it is not XML."""
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError:
        return ""
    text = "".join(_mallard(root))
    return re.sub(r"\n\s*\n+", "\n\n", text).strip() + "\n"


def _mallard(element: ElementTree.Element) -> Iterator[str]:
    tag = element.tag.split("}")[-1] if isinstance(element.tag, str) else ""
    if tag in _MALLARD_SKIPPED:
        return
    if tag in _MALLARD_OPENS:
        yield "\n"
    if element.text:
        yield re.sub(r"\s+", " ", element.text)
    for child in element:
        yield from _mallard(child)
        if child.tail:
            yield re.sub(r"\s+", " ", child.tail)
    if tag in _MALLARD_CLOSES:
        yield "\n"


def catalogue_items(content: bytes) -> Iterator[tuple[str, str]]:
    """(message, translation) of a compiled gettext catalogue; contexts and plural forms are left out."""
    order = "<" if content[:4] == _LITTLE_ENDIAN else ">"
    count, keys_at, values_at = struct.unpack(f"{order}3I", content[8:20])

    def text(table: int, index: int) -> str:
        length, at = struct.unpack(f"{order}2I", content[table + 8 * index : table + 8 * index + 8])
        return content[at : at + length].split(b"\0")[0].decode("utf-8", "replace")

    for index in range(count):
        key = text(keys_at, index).split("\x04")[-1]
        if key:
            yield key, text(values_at, index)
