"""Outputs are built aside and renamed into place: whole or absent, also after Ctrl-C, a crash or a full disk.

A run works in a folder beside its output, `.NAME.RANDOM.part`:

    .ep-export   says whose it is; locked as long as the run lives, whatever becomes of the run
    new/         what is being made
    old/         what it replaces, between the two renames; never deleted
    replaced/    the same after them

The lock says whether a folder is in use, and for which output: a second run to the same one is refused, and
what a killed run left is put right by the next run that writes there. Nothing else is ever touched. The mark
is written first and deleted last; a run killed before it had one leaves a folder without anything else in it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from ep_export.documents import read_json_object
from ep_export.errors import UserError, reason
from ep_export.interrupts import uninterrupted
from ep_export.ownership import first_foreign, is_ours

__all__ = ["exclusive", "refuse_existing", "scratch", "set_aside", "staged"]

_MARK = ".ep-export"
_UNFINISHED_MARK = "mark"
_MAKER = "ep-export"
_MARK_BEGINS = json.dumps({"made_by": _MAKER})[:-1].encode()
_SUFFIX = ".part"
_NAME_CHARACTERS = 50  # of the output's name in its work folder's: four bytes each still make a file name
_WORK_FOLDER = re.compile(rf"\..*\.[a-z0-9_]{{8}}{re.escape(_SUFFIX)}")  # as `mkdtemp` names them


class _State(Enum):
    """Whether the run that made a work folder still lives."""

    LIVES = "lives"
    GONE = "gone"
    UNKNOWN = "unknown"  # this file system has no locks


def refuse_existing(out: Path, *, overwrite: bool, marker: str) -> None:
    """Check early that `out` may be written. What killed runs left beside it is put right first.

    Args:
        out: The directory to be made; a link to one is followed.
        overwrite: It may replace an earlier output.
        marker: Index that every output of this kind holds, see `ep_export.ownership`. A directory without it
            is somebody's own and is never replaced; nor is one that holds other files.

    Raises:
        UserError: It exists and may not be replaced, another run is making it, or its parent cannot be
            written.
    """
    real = _followed(out)
    _put_right(real)
    if is_ours(real, marker):
        _put_right(real / marker)  # what a run that changed it left in it
    _refuse(real, out, overwrite=overwrite, marker=marker)
    parent = real.parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise UserError(f"{parent} cannot be written", hint="give an --out you may write to")


@contextmanager
def staged(out: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` when the block ends well and vanishes otherwise.

    It lies on the same file system as `out`, so that hard links stay possible and the rename is atomic. Where
    the block ends well and `out` cannot be replaced any more, what was made stays beside it. A block that
    moves the directory away (`set_aside`) leaves `out` as it was.

    Raises:
        UserError: See `refuse_existing`; or `out` could not be replaced in the end, and where the work is.
    """
    refuse_existing(out, overwrite=overwrite, marker=marker)
    real = _followed(out)
    real.parent.mkdir(parents=True, exist_ok=True)
    with _work_folder(real) as work:
        new, old = work / "new", work / "old"
        new.mkdir()
        yield new
        if not new.exists():
            return
        try:
            with uninterrupted():
                _put(work, real, overwrite=overwrite, marker=marker)
        except (OSError, UserError) as error:
            earlier = f", the earlier one in {old}" if old.exists() else ""
            raise UserError(
                f"{out} could not be put into place ({reason(error)}); what was made is in "
                f"{_keep(new, real)}{earlier}",
                hint="move it where it belongs",
            ) from error


def set_aside(new: Path, out: Path, *, suffix: str) -> Path:
    """Within a block of `staged`: what was made lies beside `out` for good, which stays as it is.

    Args:
        new: The block's directory.
        out: The output.
        suffix: What its name gets, and a number where that is taken: "failed" makes `NAME.failed`.

    Returns:
        Where it is now.

    Raises:
        OSError: It cannot be renamed.
    """
    beside = _free_name(_followed(out), suffix)
    new.rename(beside)
    return beside


@contextmanager
def scratch(parent: Path, name: str) -> Iterator[Path]:
    """A folder in a directory of ours, for work on what lies there; it vanishes with the block.

    Args:
        parent: The directory.
        name: Of the work: a second run of it is refused, and what a killed one left is put right.

    Raises:
        UserError: Another run is at it.
    """
    out = _followed(parent) / name
    _put_right(out)
    with _work_folder(out) as work:
        new = work / "new"
        new.mkdir()
        yield new


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """No other run works in a directory meanwhile; where directories cannot be locked, so be it.

    Raises:
        UserError: One does.
    """
    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError:  # Windows opens no directories
        yield
        return
    try:
        if _lock(handle) is _State.LIVES:
            raise UserError(
                f"{directory} is in use by another run", hint="wait for it, or give another --out"
            )
        yield
    finally:
        os.close(handle)


def _put_right(out: Path) -> None:
    """What killed runs left beside `out`; refused where a living one is making it."""
    with _alone_in(out.parent) as alone:
        _refuse_busy(out)
        _recover(out.parent)
        if alone:
            _collect_unmarked(out.parent)


def _followed(out: Path) -> Path:
    """Where the output will lie: absolute, links followed."""
    real = Path(os.path.realpath(out))
    try:
        real.lstat()
    except FileNotFoundError:
        pass
    except OSError as error:  # too long a name, a file where a folder must be: said before any work
        if error.errno not in {errno.ENOTDIR, errno.EACCES}:
            raise
    if real.is_symlink():
        raise UserError(f"{out} is a link that leads back to itself", hint="give another --out")
    return real


def _refuse(directory: Path, out: Path, *, overwrite: bool, marker: str) -> None:
    """Stop where what is in `directory` may not be replaced; errors call it `out`."""
    if not os.path.lexists(directory):
        return
    if not overwrite:
        raise UserError(f"{out} exists already", hint="give another --out, or --overwrite to replace it")
    if os.path.ismount(directory):
        raise UserError(f"{out} is a mount point, which cannot be replaced", hint="give a folder in it")
    if directory.is_dir() and not any(directory.iterdir()):
        return
    if not is_ours(directory, marker):
        raise UserError(
            f"{out} was not made by ep-export: it has no {marker} of its own", hint="give another --out"
        )
    foreign = first_foreign(directory, marker)
    if foreign is not None:
        raise UserError(
            f"{out} holds {foreign}, which ep-export did not put there and would delete",
            hint="move it away with all else that is yours, or give another --out",
        )


def _put(work: Path, out: Path, *, overwrite: bool, marker: str) -> None:
    """`work/new` becomes `out`. What was there waits in `work/old` until it does, and comes back if not."""
    old = work / "old"
    if not overwrite:
        _refuse(out, out, overwrite=False, marker=marker)  # hours may have passed
    try:
        if os.path.lexists(out):
            out.rename(old)
            _refuse(old, out, overwrite=True, marker=marker)
        (work / "new").rename(out)
        if old.exists():
            old.rename(work / "replaced")
    except BaseException:
        if old.exists() and not os.path.lexists(out):
            with contextlib.suppress(OSError):
                old.rename(out)
        raise


def _keep(new: Path, out: Path) -> Path:
    """Put finished work where it is seen; where not even that can be done it stays where it is."""
    try:
        return set_aside(new, out, suffix="new")
    except OSError:
        (new.parent / _MARK).unlink(missing_ok=True)  # nobody's any more: never collected
        return new


def _free_name(out: Path, suffix: str) -> Path:
    number = 1
    beside = out.with_name(f"{out.name}.{suffix}")
    while os.path.lexists(beside):
        number += 1
        beside = out.with_name(f"{out.name}.{suffix}-{number}")
    return beside


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is ours until the block ends, and seen to be by other runs."""
    claimed: tuple[Path, int] | None = None
    try:
        with uninterrupted(), _alone_in(out.parent):  # not between making the folder and knowing of it
            _refuse_busy(out)
            claimed = _claim(out)
        yield claimed[0]
    finally:
        if claimed is not None:
            with uninterrupted():
                _release(*claimed)


def _release(work: Path, lock: int) -> None:
    if (work / "old").exists():  # it could not be put back: nobody's any more, and never collected
        (work / _MARK).unlink(missing_ok=True)
    elif (work / _MARK).exists():
        _remove(work)
    os.close(lock)


def _remove(work: Path) -> None:
    """Delete a work folder, the mark last: a run killed meanwhile leaves what the next one knows as ours."""
    for child in work.iterdir():
        if child.name != _MARK:
            shutil.rmtree(child, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)


def _claim(out: Path) -> tuple[Path, int]:
    """A work folder for `out`, and the handle that keeps it locked."""
    prefix = f".{out.name[:_NAME_CHARACTERS]}."
    work = Path(tempfile.mkdtemp(prefix=prefix, suffix=_SUFFIX, dir=out.parent))
    try:
        lock = os.open(work / _UNFINISHED_MARK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        _lock(lock)
        os.write(lock, json.dumps({"made_by": _MAKER, "out": out.name, "pid": os.getpid()}).encode())
        (work / _UNFINISHED_MARK).rename(work / _MARK)  # seen by others only when it is whole and locked
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return work, lock


def _marks(parent: Path) -> Iterator[tuple[Path, str, int]]:
    """Work folders of ours in a directory, finished or not: folder, name of the output, process."""
    for work in sorted(parent.glob(f".*{_SUFFIX}")):
        mark = work / _MARK
        if work.is_symlink() or mark.is_symlink() or not mark.is_file():
            continue
        try:
            raw = read_json_object(mark, hint="")
        except UserError:
            continue
        out, pid = raw.get("out"), raw.get("pid")
        if raw.get("made_by") == _MAKER and isinstance(out, str) and type(pid) is int and _is_name(out):
            yield work, out, pid


def _is_name(name: str) -> bool:
    return Path(name).name == name and name not in {"", ".", ".."}


def _refuse_busy(out: Path) -> None:
    for work, name, pid in _marks(out.parent):
        if name == out.name and _state(work) is _State.LIVES:
            raise UserError(
                f"{out} is being made by another run, process {pid}",
                hint="wait for it, or give another --out",
            )


def _recover(parent: Path) -> None:
    """Put right what killed runs left: the output they were replacing comes back, the rest goes."""
    for work, name, _ in _marks(parent):
        if _state(work) is not _State.GONE:
            continue
        out, old = parent / name, work / "old"
        if old.exists() and not os.path.lexists(out):  # killed between the two renames
            with contextlib.suppress(OSError):
                old.rename(out)
        # Killed right behind them, `new` is `out`. Where both are there, somebody else made this `out`.
        if not old.exists() or not (work / "new").exists():
            _remove(work)


def _collect_unmarked(parent: Path) -> None:
    """Folders of runs that were killed before they had a mark, or after they deleted it: nothing is in them.

    Only where nobody else can be making one at this moment.
    """
    for work in sorted(parent.glob(f".*{_SUFFIX}")):
        if work.is_symlink() or not _WORK_FOLDER.fullmatch(work.name):
            continue
        with contextlib.suppress(OSError):  # no folder, not empty, or somebody else's to delete
            if os.listdir(work) == [_UNFINISHED_MARK]:  # noqa: PTH208 - names, in one reading
                _delete_unfinished(work / _UNFINISHED_MARK)
            work.rmdir()


def _delete_unfinished(mark: Path) -> None:
    """A mark that was not written, or not named, in time; what else has that name stays."""
    content = mark.read_bytes() if mark.is_file() and not mark.is_symlink() else b"a file of somebody's"
    if not content or content.startswith(_MARK_BEGINS):
        mark.unlink()


@contextmanager
def _alone_in(parent: Path) -> Iterator[bool]:
    """No other run looks at or makes work folders here; False where directories cannot be locked."""
    try:
        handle = os.open(parent, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield _lock(handle, wait=True) is _State.GONE
    finally:
        os.close(handle)


def _state(work: Path) -> _State:
    """By the lock, which ends with its process; a process number may be another's by now."""
    try:
        handle = os.open(work / _MARK, os.O_RDWR)
    except OSError:
        return _State.UNKNOWN
    try:
        return _lock(handle)
    finally:
        os.close(handle)


def _lock(handle: int, *, wait: bool = False) -> _State:
    """Lock an open file or directory until it is closed; GONE when nobody held it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return _State.UNKNOWN
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return _State.LIVES
    except OSError:
        return _State.UNKNOWN
    return _State.GONE
