"""`tiny`: a few MB of Python and English that every Python installation carries, so that nothing is downloaded.

Groups: `code.python`, the sources of the standard library; `docs.en`, the docstrings of each of its modules and the
topics of `help()`; `licence.en`, Python's licence. Left out is what distributions pack apart (tests, tkinter, idlelib,
ensurepip, lib2to3, distutils, turtledemo) and what they generate (`_sysconfigdata*`). One version of Python gives one
text; the manifest's options name the version and the files.

A module's code and its docstrings stay in one split. The split ranks the modules by a hash of their names and takes
1 % of their bytes for test and 1 % for valid, so that neither can be empty.
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

APART = {"distutils", "ensurepip", "idlelib", "lib2to3", "test", "tests", "tkinter", "turtledemo"}
TOPICS = "pydoc_data/topics.py"
LICENCE = "LICENSE.txt"
HELD_OUT = 0.01
SHORTEST = 200
"""Bytes; what is shorter is an empty __init__.py or a line."""


def texts(library: Path | None = None) -> tuple[Iterator[Text], dict[str, Any]]:
    """The documents, and what they are made of. Raises InputError if Python has no sources of its library."""
    library = library or Path(sysconfig.get_path("stdlib"))
    names = sources(library)
    if not names:
        raise InputError(f"{library} holds no sources of the standard library; use a Python that has them")
    about = {"python": platform.python_version(), "files": [*names, *_licence(library)]}
    return _texts(library, names), about


def sources(library: Path) -> list[str]:
    """Paths of the modules that are taken, below `library`, sorted."""
    found = (path.relative_to(library) for path in library.rglob("*.py") if not path.is_symlink())
    return sorted(path.as_posix() for path in found if _is_taken(path))


def _is_taken(path: Path) -> bool:
    known = path.parts[0].removesuffix(".py") in sys.stdlib_module_names
    return known and not APART.intersection(path.parts) and not path.name.startswith("_sysconfigdata")


def _licence(library: Path) -> list[str]:
    return [LICENCE] if (library / LICENCE).is_file() else []


def _texts(library: Path, names: list[str]) -> Iterator[Text]:
    contents = {name: (library / name).read_bytes() for name in names}
    split_of = _splits({name: len(content) for name, content in contents.items() if name != TOPICS})
    for name, content in contents.items():
        documents = [("docs.en", text) for text in _docs(name, content)]
        if name != TOPICS:  # its code is the topics once more, escaped
            documents.insert(0, ("code.python", content))
        for group, text in documents:
            if len(text) >= SHORTEST and b"\0" not in text:
                yield Text(split_of.get(name, "train"), group, text)
    for name in _licence(library):
        yield Text("train", "licence.en", (library / name).read_bytes())


def _splits(sizes: dict[str, int]) -> dict[str, str]:
    """Test is the first modules that make 1 % of all bytes, in the order of their names' hashes; valid the next."""
    ranked = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest(), reverse=True)
    splits = dict.fromkeys(sizes, "train")
    for split in ("test", "valid"):
        taken = 0
        while ranked and taken < HELD_OUT * sum(sizes.values()):
            splits[ranked[-1]] = split
            taken += sizes[ranked.pop()]
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
