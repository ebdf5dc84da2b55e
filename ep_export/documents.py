"""Versioned JSON files: a frozen dataclass, written whole or not at all and read with distrust."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from ep_export.errors import UserError

__all__ = ["decode", "encode", "read_document", "write_document"]

_T = TypeVar("_T")


def read_document(
    file: Path,
    kind: type[_T],
    *,
    what: str,
    newest: int,
    hint: str,
    check: Callable[[_T], None] | None = None,
) -> _T:
    """Read a file that `write_document` wrote.

    Args:
        file: The file.
        kind: The dataclass it holds.
        what: What errors call it, e.g. "sweep record".
        newest: The highest `format` that this version reads.
        hint: How to come by a good file.
        check: Raises ValueError for values that types alone do not refuse.

    Raises:
        UserError: Missing, not JSON, a newer format, another structure, or refused by `check`.
    """
    if not file.is_file():
        raise UserError(f"{what} {file} does not exist", hint=hint)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{what} {file} is not readable JSON: {error}", hint=hint) from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(found, int) and found > newest:
        message = f"{what} {file} has format {found}, this ep-export reads up to {newest}"
        raise UserError(message, hint="upgrade ep-export")
    try:
        value = decode(kind, raw)
        if check is not None:
            check(value)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not a valid {what}: {error}", hint=hint) from error
    return value


def write_document(file: Path, value: Any, *, indent: int = 2) -> None:
    """Write a dataclass as JSON, aside first and then renamed.

    Raises:
        ValueError: A number that JSON cannot hold (NaN, infinity); an older file stays.
        OSError: The directory cannot be written.
    """
    text = json.dumps(encode(value), indent=indent, allow_nan=False) + "\n"
    aside = file.with_name(f".{file.name}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def encode(value: Any) -> Any:
    """Frozen dataclasses, enums and tuples as plain JSON values."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def decode(kind: type[_T], raw: Any) -> _T:
    """The inverse of `encode`, strict: wrong types and missing fields are errors; extra fields are ignored.

    Raises:
        TypeError, ValueError, KeyError: `raw` does not describe a `kind`.
    """
    return typing.cast("_T", _decode(kind, raw, kind.__name__))


def _decode(kind: Any, raw: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(args, raw, where)
    if origin is tuple:
        return _decode_tuple(args, raw, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(raw, dict):
            raise TypeError(f"{where}: expected an object, got {type(raw).__name__}")
        return {str(key): _decode(args[1], item, f"{where}.{key}") for key, item in raw.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(raw)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, raw, where)
    if kind is float and type(raw) is int:
        return float(raw)
    if type(raw) is not kind:
        raise TypeError(f"{where}: expected {kind.__name__}, got {type(raw).__name__}")
    return raw


def _decode_union(args: tuple[Any, ...], raw: Any, where: str) -> Any:
    if raw is None and type(None) in args:
        return None
    for option in (a for a in args if a is not type(None)):
        try:
            return _decode(option, raw, where)
        except (TypeError, ValueError):
            continue
    raise TypeError(f"{where}: unexpected {type(raw).__name__}")


def _decode_tuple(args: tuple[Any, ...], raw: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(raw, list):
        raise TypeError(f"{where}: expected a list, got {type(raw).__name__}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(raw))
    if len(args) != len(raw):
        raise TypeError(f"{where}: expected {len(args)} values, got {len(raw)}")
    return tuple(
        _decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(args, raw, strict=True))
    )


def _decode_dataclass(kind: Any, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise TypeError(f"{where}: expected an object, got {type(raw).__name__}")
    hints = typing.get_type_hints(kind)
    values = {}
    for f in dataclasses.fields(kind):
        if f.name in raw:
            values[f.name] = _decode(hints[f.name], raw[f.name], f"{where}.{f.name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise KeyError(f"{where}.{f.name} is missing")
    return kind(**values)
