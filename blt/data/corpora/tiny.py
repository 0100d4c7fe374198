"""`tiny`: a few MB of Python and English text that are part of every Python installation; nothing is downloaded.

Groups: `code.python`, the sources of the standard library; `docs.en`, the docstrings of each of its modules and the
topics of `help()`; `licence.en`, Python's licence. Modules that distributions package separately (tests, tkinter,
idlelib, ensurepip, lib2to3, distutils, turtledemo) or generate (`_sysconfigdata*`) are left out. One version of Python
gives one text; the manifest's options name the version and the files.

A module's code and its docstrings are in one split. Modules are ranked by a hash of their names; the first make up
1 % of all bytes for test and the next 1 % for valid, so that neither split is empty.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blt.data.corpora.text import Text
from blt_runtime.errors import InputError

SEPARATELY_PACKAGED = {"distutils", "ensurepip", "idlelib", "lib2to3", "test", "tests", "tkinter", "turtledemo"}
TOPICS = "pydoc_data/topics.py"
LICENCE = "LICENSE.txt"
HELD_OUT = 0.01
"""The share of all bytes for each of test and valid."""
SHORTEST = 200
"""Bytes; a shorter text is an empty __init__.py or a single line."""


def texts(library: Path | None = None) -> tuple[Iterator[Text], dict[str, Any]]:
    """The documents, and values for the manifest about their origin. Raises InputError if the installation has no
    library sources."""
    library = library or Path(sysconfig.get_path("stdlib"))
    names = sources(library)
    if not names:
        raise InputError(f"{library} holds no sources of the standard library; use a Python that has them")
    about = {"python": platform.python_version(), "files": [*names, *_licence(library)]}
    return _texts(library, names), about


def sources(library: Path) -> list[str]:
    """The sorted paths, relative to `library`, of the modules that are used."""
    found = (path.relative_to(library) for path in library.rglob("*.py") if not path.is_symlink())
    return sorted(path.as_posix() for path in found if _is_used(path))


def _is_used(path: Path) -> bool:
    known = path.parts[0].removesuffix(".py") in sys.stdlib_module_names
    return known and not SEPARATELY_PACKAGED.intersection(path.parts) and not path.name.startswith("_sysconfigdata")


def _licence(library: Path) -> list[str]:
    return [LICENCE] if (library / LICENCE).is_file() else []


def _texts(library: Path, names: list[str]) -> Iterator[Text]:
    contents = {name: (library / name).read_bytes() for name in names}
    split_of = _splits({name: len(content) for name, content in contents.items() if name != TOPICS})
    for name, content in contents.items():
        documents = [("docs.en", text) for text in _docs(name, content)]
        if name != TOPICS:  # the code of this module repeats the topics, escaped
            documents.insert(0, ("code.python", content))
        for group, text in documents:
            if len(text) >= SHORTEST and b"\0" not in text:
                yield Text(split_of.get(name, "train"), group, text)
    for name in _licence(library):
        yield Text("train", "licence.en", (library / name).read_bytes())


def _splits(sizes: dict[str, int]) -> dict[str, str]:
    """The split of each module. In the order of the hashes of their names, the first modules with 1 % of all bytes are
    test, the next are valid."""
    ranked = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest(), reverse=True)
    splits = dict.fromkeys(sizes, "train")
    for split in ("test", "valid"):
        n_bytes = 0
        while ranked and n_bytes < HELD_OUT * sum(sizes.values()):
            splits[ranked[-1]] = split
            n_bytes += sizes[ranked.pop()]
    return splits


def _docs(name: str, content: bytes) -> list[bytes]:
    """The docstrings of a module as one document; the topics of `help()` as one each."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return []
    if name == TOPICS:
        (topics,) = (node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign))
        found = ast.literal_eval(topics) if topics is not None else {}
        return [text.encode() for _, text in sorted(found.items())]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    strings = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, kinds))
    return ["\n\n".join(inspect.cleandoc(text) for text in strings if text).encode(errors="ignore")]
