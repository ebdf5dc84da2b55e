"""Which files of a directory an earlier run wrote: what its own index names, and nothing else.

An output may be replaced, and replacing deletes. A directory is ours by what its index says, not by the
index's name (many a web page has a manifest.json), and within it only what the index names is ours: a picture
that somebody laid beside it is not. Indexes are read as plain JSON, so that those of other versions count.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ep_export.documents import read_json_object
from ep_export.errors import UserError

__all__ = ["first_foreign", "is_ours"]

_POLICY = re.compile(r"prune_\d+\.[\w.-]+\.onnx")

_Names: TypeAlias = Callable[[Path, Mapping[str, Any]], Iterator[Any]]


@dataclass(frozen=True)
class _Kind:
    """One kind of output.

    Attributes:
        keys: What its index holds at least, in every version.
        named: (directory, index) -> paths in the directory that the index names; other values are ignored.
        beside: Files written with it that the index does not name.
    """

    keys: frozenset[str]
    named: _Names
    beside: tuple[str, ...] = ()


def is_ours(directory: Path, marker: str) -> bool:
    """Whether a run wrote a directory.

    Args:
        directory: Any path.
        marker: The index that every output of this kind holds.
    """
    return _index(directory, marker) is not None


def first_foreign(directory: Path, marker: str) -> str | None:
    """The first file that no run of ours wrote, relative to the directory; None when all are ours.

    Links count as files and are not followed.

    Args:
        directory: Ours, see `is_ours`.
        marker: As there.
    """
    ours = _named(directory, marker)
    return next((name for name in _files(directory) if name not in ours and _written(name) not in ours), None)


def _named(directory: Path, marker: str) -> set[str]:
    """Paths of what a run wrote; none where the directory is not ours."""
    index = _index(directory, marker)
    if index is None:
        return set()
    kind = _KINDS[marker]
    names = {name for name in kind.named(directory, index) if isinstance(name, str)}
    return {marker, *kind.beside, *names}


def _index(directory: Path, marker: str) -> Mapping[str, Any] | None:
    file = directory / marker
    if not file.is_file() or file.is_symlink():
        return None
    try:
        raw = read_json_object(file, hint="")
    except UserError:
        return None
    return raw if _KINDS[marker].keys <= set(raw) else None


def _files(directory: Path) -> Iterator[str]:
    """Everything below a directory that is no directory, sorted within each."""
    for folder, folders, files in os.walk(directory):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]  # noqa: PTH114, PTH118
        folders.sort()
        for name in sorted([*files, *links]):
            yield Path(folder, name).relative_to(directory).as_posix()


def _written(name: str) -> str:
    """The document a name was about to become when its writer was killed: `.NAME.part` is NAME."""
    folder, slash, last = name.rpartition("/")
    if last.startswith(".") and last.endswith(".part"):
        last = last[1 : -len(".part")]
    return f"{folder}{slash}{last}"


def _entries(value: Any, key: str) -> Iterator[Any]:
    """`key` of every object in a list, or among an object's values."""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for item in items:
        if isinstance(item, Mapping):
            yield item.get(key)


def _bundle(directory: Path, index: Mapping[str, Any]) -> Iterator[Any]:
    yield from _entries(index["files"], "path")
    yield from _entries(index["components"], "file")
    # What a run moved in that was killed before it wrote the index.
    yield from ("report/report.json", "report/report.html")
    yield from (file.name for file in directory.iterdir() if _POLICY.fullmatch(file.name))
    # What was compiled into it: a kit is not in the manifest, engines are from when they are taken in.
    for folder in directory.glob("engines/*"):
        for marker in ("kit.json", "engine.json"):
            yield from (f"engines/{folder.name}/{name}" for name in _named(folder, marker))


def _kit(directory: Path, _: Mapping[str, Any]) -> Iterator[Any]:
    """A kit's checksums name all of it, a line each: the sum, two characters, the path."""
    sums = directory / "SHA256SUMS"
    if sums.is_file():
        for line in sums.read_text(encoding="utf-8", errors="surrogateescape").split("\n"):
            yield line[66:]


def _engines(_: Path, index: Mapping[str, Any]) -> Iterator[Any]:
    yield from _entries(index["components"], "file")
    yield from _entries([index.get("plugin")], "file")


def _sweep(_: Path, index: Mapping[str, Any]) -> Iterator[Any]:
    yield from _entries(index["gallery"], "picture")


def _repository(_: Path, index: Mapping[str, Any]) -> Iterator[Any]:
    files = index.get("files")
    yield from files if isinstance(files, list) else ()


def _polygraphy(_: Path, index: Mapping[str, Any]) -> Iterator[Any]:
    for component in index["runs"] if isinstance(index["runs"], Mapping) else ():
        yield f"{component}.inputs.json"
        yield f"{component}.outputs.json"


_KINDS: Mapping[str, _Kind] = {
    "manifest.json": _Kind(frozenset({"format", "model", "files", "components"}), _bundle),
    "kit.json": _Kind(frozenset({"target", "limits", "profiles"}), _kit, beside=("SHA256SUMS",)),
    "engine.json": _Kind(frozenset({"target", "limits", "components"}), _engines),
    "sweep.json": _Kind(
        frozenset({"format", "rows", "gallery"}), _sweep, beside=("report.html", "sweep.png")
    ),
    "repository.json": _Kind(frozenset({"models", "runtime", "made_by"}), _repository),
    "polygraphy.json": _Kind(frozenset({"verdict", "stages", "runs"}), _polygraphy),
}
"""Index -> its kind. What writes an index keeps its keys, or adds them here."""
