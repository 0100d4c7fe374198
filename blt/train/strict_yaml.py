"""YAML of configurations, strictly: bounded in size, depth and aliases, without repeated keys and giant numbers."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from blt_runtime.errors import shown
from blt_runtime.reading import DEEPEST

LARGEST = 64 << 10
"""Most bytes of a configuration; the library reads about 100 KB a second."""
MOST_NODES = 50_000
"""Most values after every alias is replaced by what it names: nine nested lists of nine aliases are 387 million."""
BITS = 64
_FAILURES = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError)
"""What the library raises for values that do not fit an explicit tag (`!!bool maybe`)."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ValueError(f"the key {shown(key.value)} is there twice")
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse(text: str) -> Any:
    """The value of a YAML text. Raises ValueError with a message of one line."""
    if len(text) > LARGEST:
        raise ValueError(f"more than {LARGEST:,} characters")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {}, 0)
        value = loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None
    except _FAILURES as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    _check_numbers(value)
    return value


def _size(node: yaml.Node, known: dict[int, int], level: int) -> int:
    """Values in a node with its aliases replaced. Raises ValueError for too many, or a node inside itself."""
    if level > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} levels deep, or an alias of itself")
    if id(node) not in known:
        items = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [part for item in items for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_size(part, known, level + 1) for part in inner)
    if known[id(node)] > MOST_NODES:
        raise ValueError(f"its aliases make more than {MOST_NODES:,} values")
    return known[id(node)]


def _check_numbers(value: Any) -> None:
    if isinstance(value, int) and value.bit_length() > BITS:
        raise ValueError(f"{shown(value)} is too large a number")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _check_numbers(item)
