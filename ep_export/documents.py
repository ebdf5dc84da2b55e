"""Versioned JSON files: a frozen dataclass, written whole or not at all and read with distrust."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from ep_export.errors import UserError, reason

__all__ = [
    "decode",
    "encode",
    "parse_json",
    "read_document",
    "read_json",
    "read_json_object",
    "write_document",
]

_T = TypeVar("_T")

# Several times the largest index or vocabulary published; parsed, a longer file takes gigabytes.
_MOST_BYTES = 1 << 28


def parse_json(text: bytes, *, unique_keys: bool = False) -> Any:
    """JSON from anywhere as plain values, all of which can be computed with, printed and written again.

    Args:
        text: UTF-8.
        unique_keys: Refuse an object in which a key stands twice; else its last value counts.

    Raises:
        ValueError: No JSON, nested too deeply, a number that is not finite or too large for a float, or a
            lone surrogate, which no file name and no output can hold.
    """
    hook = _unique if unique_keys else None
    try:
        raw = json.loads(
            text.decode(), parse_constant=_not_finite, parse_float=_finite, object_pairs_hook=hook
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if b"\\ud" in text.lower():
        json.dumps(raw, ensure_ascii=False).encode()
    return raw


def read_json(file: Path, *, hint: str, what: str = "") -> Any:
    """A JSON file, see `parse_json`.

    Args:
        file: The file.
        hint: How to come by a good one.
        what: What errors call it, before its path.

    Raises:
        UserError: It cannot be read, is over 256 MiB, or is no JSON.
    """
    name = f"{what} {file}".lstrip()
    try:
        if not file.is_file():  # a pipe would be waited for
            raise UserError(f"{name} is not a file", hint=hint)
        if file.stat().st_size > _MOST_BYTES:
            raise UserError(f"{name} is over {_MOST_BYTES >> 20} MiB, too large for what it holds", hint=hint)
        return parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is not readable JSON: {reason(error)}", hint=hint) from error


def read_json_object(file: Path, *, hint: str) -> dict[str, Any]:
    """A JSON file whose top level is an object.

    Raises:
        UserError: It is not; see `read_json`.
    """
    raw = read_json(file, hint=hint)
    if not isinstance(raw, dict):
        raise UserError(f"{file} holds a JSON {type(raw).__name__}, expected an object", hint=hint)
    return raw


def read_document(
    file: Path,
    kind: type[_T],
    *,
    what: str,
    newest: int,
    oldest: int = 1,
    hint: str,
    check: Callable[[_T], None] | None = None,
) -> _T:
    """Read a file that `write_document` wrote.

    Args:
        file: The file.
        kind: The dataclass it holds.
        what: What errors call it, e.g. "sweep record".
        newest: The highest `format` that this version reads.
        oldest: The lowest.
        hint: How to come by a good file.
        check: Raises ValueError for values that types alone do not refuse.

    Raises:
        UserError: Missing, not JSON, a newer format, another structure, or refused by `check`.
    """
    if not file.is_file():
        raise UserError(f"{what} {file} does not exist", hint=hint)
    raw = read_json(file, what=what, hint=hint)
    found = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(found, int) and found > newest:
        message = f"{what} {file} has format {found}, this ep-export reads up to {newest}"
        raise UserError(message, hint="upgrade ep-export")
    if isinstance(found, int) and found < oldest:
        raise UserError(f"{what} {file} has format {found}, this ep-export reads {oldest} and up", hint=hint)
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
        return _finite(raw)
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


def _finite(number: str | int) -> float:
    try:
        value = float(number)
    except OverflowError as error:
        raise ValueError("a number is too large") from error
    if not math.isfinite(value):
        raise ValueError(f"{number} is too large a number")
    return value


def _not_finite(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key!r} appears twice")
        values[key] = value
    return values
