"""The splits of a data folder, and how the names of files and folders select them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import PurePath

from blt_runtime.errors import InputError, UsageError

SPLITS = ("train", "valid", "test")
SHARES = (98.0, 1.0, 1.0)
_SPLIT_OF = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
}
_SOURCE_CODE = (
    ".bash", ".c", ".cc", ".cpp", ".cs", ".css", ".cxx", ".go", ".h", ".hpp", ".hs", ".html", ".ipynb", ".java", ".jl",
    ".js", ".jsx", ".kt", ".lua", ".m", ".md", ".ml", ".php", ".pl", ".ps1", ".py", ".pyi", ".r", ".rb", ".rs", ".rst",
    ".scala", ".scss", ".sh", ".sql", ".swift", ".tcl", ".ts", ".tsx", ".vue", ".yaml", ".yml",
)  # fmt: skip
"""Endings of source files such as test_x.py: their own names select no split, those of their folders do."""


def split_by_name(place: PurePath) -> str | None:
    """The split that a word in the names of a file and its folders selects; None without such a word.

    Raises InputError if two words select different splits.
    """
    own = [] if place.suffix.lower() in _SOURCE_CODE else [place.name]
    splits = {split for name in (*place.parts[:-1], *own) for split in splits_in(name)}
    if len(splits) > 1:
        raise InputError(f"{place} names the splits {' and '.join(sorted(splits))}; rename it, or give --ignore-names")
    return next(iter(splits), None)


def splits_in(name: str) -> set[str]:
    """The splits that the words of one name select."""
    return {_SPLIT_OF[word] for word in re.split(r"[\W_\d]+", name.lower()) if word in _SPLIT_OF}


def check_shares(split: Sequence[float]) -> tuple[float, ...]:
    """Raises UsageError unless these are three shares."""
    if len(split) != len(SPLITS) or not all(0 <= share < math.inf for share in split) or not split[0] > 0:
        raise UsageError("split must be three shares for train, valid and test, like 98/1/1, with train above 0")
    return tuple(float(share) for share in split)
