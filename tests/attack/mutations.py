"""Seeded damage to files, and what every reader owes: it works, or it says one sentence and a hint.

Damage is of three kinds: values of JSON that no field means, bytes of binary formats, letters of text. The
generator is `random.Random` with a seed in the test's name, so that a failure comes back.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from random import Random
from typing import Any

from ep_export.cli.console import print_error
from ep_export.errors import UserError

__all__ = ["Tally", "cases", "damaged_bytes", "damaged_json", "damaged_text", "sample", "seeded", "shown"]

_NUMBERS = (0, -1, 1, 2, 3, 7, 10**9, -(10**9), 2**31, 2**63, 10**400, 0.0, 0.5, 1.5, -1e300, 5e-324)
_STRINGS = ("", "x", "a\nerror: faked", "\x1b[31m\x07", "\0", "../../etc/passwd", "/etc/passwd", "x" * 5000)
_LISTS: tuple[Any, ...] = ([], [[]], [0], [1, 2, 3], ["x"], [None])
_OBJECTS: tuple[Any, ...] = ({}, {"x": 1}, {"size": -1})
_VALUES: tuple[Any, ...] = (None, True, False, *_NUMBERS, *_STRINGS, "ü\u202e", *_LISTS, *_OBJECTS)
_PLAIN = ("", "null", "[]", "3", '"x"', "NaN", "{", "\ufeff{}", "{} {}")
_ODD = ('{"a": 1e999}', '{"a": "\\ud800"}', '{"a": 1, "a": 2}', "[" * 20_000, '{"a":' * 20_000)
_TEXTS = (*_PLAIN, *_ODD)
# A case that hangs must fail and not stop the suite; none takes a tenth of this.
_SECONDS = 60
_MORE_BYTES = 3 << 30


def seeded(seed: int | str) -> Random:
    """The same damage every time; other damage with another ATTACK_SEED in the environment."""
    return Random(f"{seed} {os.environ.get('ATTACK_SEED', '')}")  # noqa: S311 - not a secret


def cases(usual: int) -> int:
    """How many cases a test tries: the usual number, or ATTACK_CASES times as many."""
    return usual * int(os.environ.get("ATTACK_CASES", "1"))


def sample(kind: Any) -> Any:
    """JSON values that a dataclass decodes from, as far as its types go."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return sample(next(option for option in args if option is not type(None)))
    if origin is tuple:
        return [sample(args[0])] * 2 if args[1:] == (...,) else [sample(each) for each in args]
    if origin is not None:
        return {"a": sample(args[1])}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        required = (field for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING)
        return {field.name: sample(hints[field.name]) for field in required}
    if issubclass(kind, Enum):
        return next(iter(kind)).value
    return {int: 2, float: 0.5, bool: True, str: "x"}.get(kind)


class Hung(BaseException):
    """Not caught by what turns exceptions into sentences."""


class Tally(Counter[str]):
    """Cases by outcome, of one test."""

    def case(self, what: object, call: Callable[[], object]) -> None:
        """Run one case.

        Args:
            what: Said when it fails.
            call: The reader.
        """
        refusal = None
        with _guarded():
            try:
                call()
            except UserError as error:
                refusal = error
            except BaseException as error:
                if hasattr(error, "add_note"):
                    error.add_note(f"case: {str(what)[:2000]}")
                raise
        self["accepted" if refusal is None else "refused"] += 1
        if refusal is not None:
            assert str(refusal).strip(), what
            assert refusal.hint.strip(), f"no hint: {refusal}; {what}"

    def counted(self, capsys: Any, *, least: int) -> None:
        """Print how many there were, and hold that both outcomes occurred: else nothing was tested."""
        with capsys.disabled():
            print(f" [{sum(self.values())} cases: {dict(self)}]", end="")
        assert sum(self.values()) >= least
        assert self["refused"]


def shown(error: UserError, capsys: Any) -> list[str]:
    """The lines a person gets."""
    print_error(str(error), error.hint)
    return capsys.readouterr().err.splitlines()


@contextmanager
def _guarded() -> Iterator[None]:
    """Neither for ever nor in all of the machine's memory."""
    import resource

    def late(*_: object) -> None:
        raise Hung

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MORE_BYTES, hard))
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def damaged_json(rng: Random, value: Any) -> tuple[str, str]:
    """JSON text like that of a value, and what was done to it."""
    if rng.random() < 0.08:
        text = rng.choice(_TEXTS)
        return text, f"text {text[:30]!r}"
    changed = copy.deepcopy(value)
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(changed))
        if not places:
            break
        container, key, path = rng.choice(places)
        if isinstance(container, dict) and rng.random() < 0.15:
            del container[key]
            done.append(f"without {path}")
        elif isinstance(container[key], (int, float)) and rng.random() < 0.3:
            container[key] = rng.choice(
                (container[key] + 1, container[key] - 1, container[key] * 2, -container[key])
            )
            done.append(f"{path} = {container[key]!r}")
        else:
            container[key] = copy.deepcopy(rng.choice(_VALUES))
            done.append(f"{path} = {str(container[key])[:40]!r}")
    return json.dumps(changed), "; ".join(done)


def _places(value: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Every key of every object, and the first items of every list."""
    keys: list[Any] = (
        list(value)
        if isinstance(value, dict)
        else list(range(min(len(value), 4)))
        if isinstance(value, list)
        else []
    )
    for key in keys:
        yield value, key, f"{path}.{key}"
        yield from _places(value[key], f"{path}.{key}")


def damaged_bytes(rng: Random, data: bytes, *, head: int = 120) -> bytes:
    """A file cut short, with bytes changed, or with a piece of it in another place."""
    if rng.random() < 0.15:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    within = min(len(changed), head) if rng.random() < 0.4 else len(changed)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        changed[rng.randrange(within)] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    if rng.random() < 0.2:
        start, target, size = rng.randrange(len(changed)), rng.randrange(len(changed)), rng.randrange(1, 40)
        changed[target : target + size] = changed[start : start + size]
    return bytes(changed)


def damaged_text(rng: Random, text: str) -> str:
    """Letters changed, left out, doubled, or moved."""
    letters = list(text)
    for _ in range(rng.choice((1, 2, 5, 20))):
        if not letters:
            break
        at = rng.randrange(len(letters))
        action = rng.randrange(4)
        if action == 0:
            letters[at] = rng.choice("{}%[]()\"'|~*+-.:=#x9\n\0\u202e")
        elif action == 1:
            del letters[at]
        elif action == 2:
            letters[at : at + 1] = letters[at : at + 1] * rng.choice((2, 50))
        else:
            letters[at:at] = text[rng.randrange(len(text)) :][: rng.randrange(20)]
    return "".join(letters)
