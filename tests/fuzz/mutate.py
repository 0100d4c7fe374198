"""Structured mutations: of JSON values, of bytes and of tensors. A seeded generator decides everything."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch

ESCAPES = "\x1b[31m\x9b2J\u202e\x07"


def nested(levels: int = 40) -> Any:
    """A list whose text would have 10^levels characters; its lists are shared."""
    value: Any = "x"
    for _ in range(levels):
        value = [value] * 10
    return value


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 65536, 2**31, 2**31 - 1, 2**63, 2**64, 2**200, -(2**63), 0.5, -0.0, 1e308),
    *(1e-320, float("nan"), float("inf"), "", "x", "0", "None", "../x", "/etc/passwd", "a/b", ".", "\0", ESCAPES),
    *("[/red]", "ä" * 300, "x" * 100_000, [], {}, [[]], [None], [0] * 1000, {"": ""}, {"a": {"a": {}}}),
    *({ESCAPES: ESCAPES}, "blt", "entropy"),
)
"""What replaces a value of a JSON file."""
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def json_value(rng: random.Random, value: Any, extra: tuple[Any, ...] = ()) -> Any:
    """A copy with one to three places changed: replaced, removed, repeated, renamed or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(islice(_places(value), 3000))
        if not places:
            return copy.deepcopy(rng.choice(VALUES))
        holder, key = rng.choice(places)
        change = rng.randrange(6)
        if change <= 1:
            holder[key] = copy.deepcopy(rng.choice(VALUES + extra))
        elif change == 2:
            del holder[key]
        elif change == 3:
            other, at = rng.choice(places)
            if at in other if isinstance(other, dict) else at < len(other):
                holder[key] = copy.deepcopy(other[at])
        elif change == 4 and isinstance(holder, dict):
            holder[_renamed(rng, str(key))] = holder.pop(key)
        elif isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            number = holder[key]
            holder[key] = rng.choice((number + 1, number - 1, -number, number * 1000, number / 3))
        else:
            holder[key] = [holder[key]] * rng.choice((0, 1, 2, 1000))
    return value


def _places(value: Any) -> Any:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


def _renamed(rng: random.Random, key: str) -> str:
    return rng.choice((key + "s", key[:-1], key.upper(), ESCAPES + key, "", key * 100))


def json_text(rng: random.Random, value: Any) -> bytes:
    """A mutated JSON file: mostly a changed value, at times broken or repeated text."""
    if rng.random() < 0.75:
        value = json_value(rng, value)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    if rng.random() < 0.3:
        text = rng.choice((_twice, _deep, _nan, _halves))(rng, text)
    data = text.encode("utf-8", "surrogatepass")
    return raw(rng, data) if rng.random() < 0.2 else data


def _twice(rng: random.Random, text: str) -> str:
    return text.replace("{", '{"format": 1, "format": 2, ', 1)


def _deep(rng: random.Random, text: str) -> str:
    n = rng.choice((70, 1000, 100_000))
    return text.replace(":", ": " + "[" * n + "]" * n + ", 'x':", 1) if rng.random() < 0.5 else "[" * n + text + "]" * n


def _nan(rng: random.Random, text: str) -> str:
    return text.replace(": ", ": " + rng.choice(("NaN,", "1e999", "-Infinity", "9" * 5000, "\\ud800")), 1)


def _halves(rng: random.Random, text: str) -> str:
    return text.replace('"', '"\\ud83d', rng.randrange(1, 5))


def json_or_bytes(rng: random.Random, data: bytes) -> bytes:
    """`json_text` of a file that may be no JSON any more, because it was mutated before."""
    try:
        return json_text(rng, json.loads(data))
    except (ValueError, RecursionError):
        return raw(rng, data)


def raw(rng: random.Random, data: bytes) -> bytes:
    """Bytes with one to eight changes: flipped, cut, repeated, moved, or a number of 1, 2, 4 or 8 bytes replaced."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        if not out:
            return bytes(rng.randrange(256) for _ in range(rng.randrange(40)))
        at = rng.randrange(len(out)) if rng.random() < 0.5 else rng.randrange(min(len(out), 256))
        size = min(len(out) - at, rng.choice((1, 2, 8, 100, 5000)))
        change = rng.randrange(7)
        if change == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            width = rng.choice("BHIQ")
            number = struct.pack(f"<{width}", rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(f"<{width}")))
            out[at : at + len(number)] = number
        elif change == 2:
            del out[at:]
        elif change == 3:
            del out[at : at + size]
        elif change == 4:
            out[at:at] = out[at : at + size] * rng.choice((1, 2, 20))
        elif change == 5:
            out[at : at + size] = bytes([rng.choice((0, 255, 128, 91, 40, 93))]) * size
        else:
            other = rng.randrange(len(out))
            out[at : at + size] = out[other : other + size]
    return bytes(out)


def tensor(rng: random.Random, value: torch.Tensor) -> Any:
    """Another tensor, or none: of another shape, type, layout or size by strides."""
    made: tuple[Callable[[], Any], ...] = (
        lambda: value.T if value.ndim == 2 else value,
        lambda: torch.zeros(1).as_strided(value.shape, (0,) * value.ndim),
        lambda: torch.zeros(1).expand(1 << 20, 1 << 12),
        lambda: torch.zeros(4096).unfold(0, 2048, 1),
        lambda: value.to(rng.choice((torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool))),
        lambda: value.to(torch.complex64),
        lambda: value.to_sparse() if value.ndim else value,
        lambda: value.to("meta"),
        lambda: value[:0] if value.ndim else value,
        lambda: value[None],
        lambda: torch.full_like(value, float("nan")),
        lambda: torch.nn.Parameter(value),
        lambda: value.to(torch.complex64).conj().imag,
        lambda: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        lambda: torch.empty(0),
        lambda: torch.zeros((1,) * 40),
        lambda: rng.choice(VALUES),
    )
    return rng.choice(made)()
