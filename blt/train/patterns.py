"""Factors by shell patterns over names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from blt_runtime.errors import ConfigError


def factor_of(name: str, factors: Mapping[str, float]) -> float:
    """The factor of the last pattern that matches, 1 if none does."""
    found = [factor for pattern, factor in factors.items() if fnmatchcase(name, pattern)]
    return found[-1] if found else 1.0


def check_used(key: str, patterns: Iterable[str], names: Iterable[str], what: str) -> None:
    """Raises ConfigError for a pattern of the setting `key` that matches none of the names. what: a name is of it."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise ConfigError(f"{key}: {pattern!r} matches no {what}; the nearest name is {near[0]!r}")
