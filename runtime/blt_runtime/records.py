"""Frozen dataclasses to plain JSON values and back, strictly: unknown keys, missing keys and wrong types
are errors.

Small on purpose: it supports only the types that manifests use (numbers, text, booleans, None, Literal, Any,
tuples, dicts, nested dataclasses).
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import BltError, ConfigError, nearest, shown

T = TypeVar("T")
FORMER = "former"
"""The key of a field's metadata for the name that files of earlier versions have for it."""


def to_dict(record: Any) -> dict[str, Any]:
    """The JSON object of a dataclass; tuples become lists."""
    return {f.name: _plain(getattr(record, f.name)) for f in dataclasses.fields(record)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value


def from_dict(cls: type[T], data: Any, where: str, error: type[BltError] = ConfigError) -> T:
    """The dataclass `cls` from a JSON object. Raises `error`; `where` names the object in its message."""
    if not isinstance(data, Mapping):
        raise error(f"{where} must be an object, not {shown(data)}")
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    former = {f.metadata[FORMER]: name for name, f in fields.items() if FORMER in f.metadata}
    data = {key if key in fields else former.get(key, key): value for key, value in data.items()}
    for key in data:
        if key not in fields:
            raise error(f"{where} has the unknown key {shown(key)}: {nearest(str(key), fields)}")
    for name, field in fields.items():
        if name not in data and _required(field):
            raise error(f"{where} lacks the key {name!r}")
    return cls(**{key: _value(hints[key], value, f"{where}.{key}", error) for key, value in data.items()})


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _value(kind: Any, value: Any, where: str, error: type[BltError]) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Literal:
        return _expect(value in args, value, where, " or ".join(map(repr, args)), error)
    if origin in (Union, types.UnionType):
        return _union(args, value, where, error)
    if origin is tuple:
        _expect(isinstance(value, list | tuple), value, where, "a list", error)
        return tuple(_value(args[0], v, f"{where}[{i}]", error) for i, v in enumerate(value))
    if origin is dict:
        _expect(isinstance(value, Mapping), value, where, "an object", error)
        return {str(k): _value(args[1], v, f"{where}.{k}", error) for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where, error)  # type: ignore[arg-type]
    return _scalar(kind, value, where, error)


def _union(args: tuple[Any, ...], value: Any, where: str, error: type[BltError]) -> Any:
    if value is None and type(None) in args:
        return None
    rest = [a for a in args if a is not type(None)]
    exact = [a for a in rest if a is type(value)]
    return _value((exact or rest)[0], value, where, error)


def _scalar(kind: Any, value: Any, where: str, error: type[BltError]) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    return _expect(type(value) is kind, value, where, kind.__name__, error)


def _expect(ok: bool, value: Any, where: str, wanted: str, error: type[BltError]) -> Any:
    if not ok:
        raise error(f"{where} must be {wanted}, not {shown(value)}")
    return value
