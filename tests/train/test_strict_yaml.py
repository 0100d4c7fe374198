"""YAML of configurations is bounded: aliases, depth, repeated keys and numbers."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from blt.train.config import load_config
from blt.train.strict_yaml import parse
from blt_runtime.errors import ConfigError

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD = {
    "aliases": (LAUGHS, "aliases make more than"),
    "an alias of itself": ("a: &a [*a]", "alias of itself"),
    "a key of itself": ("&a {*a : 1}", "alias of itself"),
    "depth": ("[" * 100 + "]" * 100, "levels deep"),
    "more depth": ("[" * 30_000, "levels deep"),
    "mappings in mappings": ("{a: " * 5_000, "levels deep"),
    "a repeated key": ("a: 1\nb: {c: 1, c: 2}", "the key 'c' is there twice"),
    "a large number": ("a: " + "9" * 5_000, "4300"),
    "a large hexadecimal number": ("a: 0x" + "f" * 5_000, "too large a number"),
    "a large number in a list": ("a: [1, {b: 99999999999999999999999}]", "too large a number"),
    "size": ("a: " + "x" * 70_000, "more than 65,536"),
    "an invalid boolean": ("a: !!bool maybe", "maybe"),
    "a wrong date": ("a: !!timestamp x", ""),
    "an empty number": ("a: !!int ''", ""),
    "an object": ("a: !!python/object/apply:os.system [echo]", "could not determine a constructor"),
    "a list as a key": ("? [a]\n: 1", "unhashable"),
    "two documents": ("a: 1\n---\nb: 1", "expected a single document"),
    "a control character": ("a: \x1b[31m", "not allowed"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused_is_one_quick_line(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    (tmp_path / "c.yaml").write_text(text)
    start = time.thread_time()
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "c.yaml")
    assert time.thread_time() - start < 3  # under a second on an idle core
    assert message in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_what_is_fine() -> None:
    text = "a: &a {x: 1, y: [1, 2.5, true, null]}\nb: {<<: *a, x: 2}\nc: *a\nd: 18446744073709551615\n"
    value = parse(text)
    assert value["b"] == {"x": 2, "y": [1, 2.5, True, None]}
    assert value["c"] == value["a"]
    assert parse("") is None
