"""Checks of what a caller passes: every wrong type or value is a UsageError of one line.

Numbers may be Python's or numpy's; a bool is not a number, and NaN and infinity are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .errors import UsageError, nearest, shown


def is_whole(value: object) -> bool:
    """A Python or numpy integer, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """A finite Python or numpy number that a float can hold, and no bool."""
    if isinstance(value, float | np.floating):
        return math.isfinite(value)
    return is_whole(value) and abs(int(value)) < 1 << 1000  # type: ignore[call-overload]


def whole(name: str, value: object, least: int = 0, most: int | None = None, wanted: str | None = None) -> int:
    """`value` as an int. Raises UsageError unless it is a whole number in least..most."""
    if not is_whole(value) or not least <= int(value) or (most is not None and int(value) > most):  # type: ignore[call-overload]
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UsageError(f"{name} must be {wanted or f'a whole number {limits}'}, not {shown(value)}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def number(name: str, value: object, allowed: Callable[[Any], bool], wanted: str) -> float:
    """`value` as a float. Raises UsageError unless it is a number that is allowed."""
    if not is_number(value) or not allowed(value):
        raise UsageError(f"{name} must be {wanted}, not {shown(value)}")
    return float(value)  # type: ignore[arg-type]


def flag(name: str, value: object) -> bool:
    """`value` as a bool. Raises UsageError unless it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise UsageError(f"{name} must be True or False, not {shown(value)}")
    return bool(value)


def choice(name: str, value: object, known: Iterable[str]) -> None:
    """Raises UsageError unless `value` is one of the known words."""
    words = tuple(known)
    if not isinstance(value, str):
        raise UsageError(f"{name} {shown(value)} is unknown; known: {', '.join(words)}")
    if value not in words:
        raise UsageError(f"{name} {shown(value)} is unknown: {nearest(value[:40], words)}")


def instance(name: str, value: Any, kind: type, wanted: str) -> None:
    """Raises UsageError unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise UsageError(f"{name} must be {wanted}, not {shown(value)}")


def as_bytes(name: str, text: object) -> bytes:
    """UTF-8 of a str (characters without an encoding, lone surrogates, are dropped), or the bytes themselves. Raises
    UsageError for anything else: `bytes(7)` would be seven NULs, and `bytes(array)` the array's memory."""
    if isinstance(text, str):
        return text.encode("utf-8", errors="ignore")
    if isinstance(text, bytes | bytearray):
        return bytes(text)
    raise UsageError(f"{name} must be text (str) or bytes, not {shown(text)}")
