"""As much of the protobuf text format as a config.pbtxt uses."""

from __future__ import annotations

import re
from typing import Any

TOKEN = re.compile(r'\s+|#[^\n]*|("(?:[^"\\\n]|\\.)*")|(-?[A-Za-z0-9_]+)|([{}\[\]:,])')


def parse(text: str) -> dict[str, list[Any]]:
    """Every field with the list of its values. Raises AssertionError for what is not in the format."""
    tokens, at = [], 0
    while at < len(text):
        found = TOKEN.match(text, at)
        assert found, text[at : at + 20]
        at = found.end()
        if found.lastindex:
            tokens.append(found[0])
    message = _message(tokens, "")
    assert not tokens
    return message


def _message(tokens: list[str], end: str) -> dict[str, list[Any]]:
    made: dict[str, list[Any]] = {}
    while tokens and tokens[0] != end:
        name = tokens.pop(0)
        assert re.fullmatch(r"[a-z_]+", name), name
        if tokens[0] == ":":
            tokens.pop(0)
        made.setdefault(name, []).extend(_values(tokens))
    assert (tokens.pop(0) if end else "") == end
    return made


def _values(tokens: list[str]) -> list[Any]:
    if tokens[0] != "[":
        return [_value(tokens)]
    found = []
    while tokens.pop(0) != "]":
        found.append(_value(tokens))
        assert tokens[0] in ",]"
    return found


def _value(tokens: list[str]) -> Any:
    token = tokens.pop(0)
    if token == "{":
        return _message(tokens, "}")
    if token.startswith('"'):
        octal = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), token[1:-1])
        return octal.encode("latin-1").decode()
    return int(token) if re.fullmatch(r"-?\d+", token) else token
