"""Atomic outputs: a file or a folder appears complete or not at all. No torch: data preparation needs none.

An output is written under a hidden name next to the final one, `.NAME.RANDOM.part`, and locked while its process lives.
The system releases the lock when the process dies, so the next process that writes NAME can tell a leftover from a file
that is being written. Process numbers could not: two containers use the same ones.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from blt_runtime.errors import UsageError

_HIDDEN = r"\.{}\.(?:[0-9]+|[0-9a-f]{{16}})\.(?:part|old|tmp)"
"""The hidden names of an output; numbers are those of processes of earlier versions."""
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
log = logging.getLogger("blt.files")


def check_target(out: Path, force: bool, what: str, is_ours: Callable[[Path], bool]) -> None:
    """Raises UsageError if something is in the way of the folder `out`. `force` replaces what `is_ours` accepts, which
    holds `what`, and nothing else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_ours(out):
        raise UsageError(f"{out} exists and does not hold {what}; give a new folder")
    if not force:
        raise UsageError(f"{out} holds {what} already; give another folder, or --force to replace it")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary folder next to `out`. It becomes `out` when the block ends, and is removed if the block raises.

    An older `out` is replaced in one step where the system can exchange two names (Linux). Elsewhere it is absent for
    the moment between two renames, and `recover` restores it if the process is killed there. Leftovers of killed
    processes are removed first. Raises UsageError if the folder cannot be made.
    """
    out = out.resolve()  # a link stays; its target is replaced
    with naming(out), scratch(out) as temporary:
        yield temporary
        replace_folder(temporary, out)


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A temporary folder next to `out`, removed when the block ends. Raises UsageError if it cannot be made."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        temporary, lock = _claim(out, "part", lambda path: path.mkdir())
    except OSError as error:
        raise UsageError(f"cannot write to {out.parent}: {error.strerror}") from error
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def replace_folder(finished: Path, out: Path) -> None:
    """Renames `finished` to `out`; both must be in one file system. An older `out` is removed.

    `out` is complete at every moment. Where names cannot be exchanged, the older `out` is moved aside first, and
    restored if the renaming fails.
    """
    if not os.path.lexists(out):
        finished.rename(out)
        return
    if _exchange(finished, out):
        shutil.rmtree(finished, ignore_errors=True)
        return
    old = _hidden(out, "old")
    with _locked(out):  # so that `recover` in another process leaves it alone
        out.rename(old)
        try:
            finished.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def recover(out: Path) -> None:
    """Restores `out` if a process was killed after it had moved it aside, before the new one was in its place."""
    with suppress(OSError, RuntimeError, ValueError):  # also of a name that no file can have
        out = out.resolve()
        if os.path.lexists(out):
            return
        aside = [path for path in _siblings(out) if path.suffix == ".old"]
        for path in sorted(aside, key=lambda path: -path.stat().st_mtime_ns):
            with _locked(path) as dead:
                if dead and not os.path.lexists(out):
                    path.rename(out)
                    log.warning("restored %s, which a killed process had moved aside", out)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary binary file next to `path`, open for writing and reading.

    It is flushed to the disk and renamed to `path` when the block ends, and removed if the block raises. Leftovers of
    killed processes are removed first.
    """
    _remove_leftovers(path)
    temporary, lock = _claim(path, "part", lambda path: path.touch(exist_ok=False))
    try:
        with naming(path), temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts `path` into the OSError of a full disk, which names no file, or a hidden one."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            error.filename = str(path)
        raise


def check_folder(path: Path) -> None:
    """Raises UsageError unless a file `path` can be written: called before the work starts."""
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} does not exist; make it first")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{path}: the folder {path.parent} is read-only; choose another")


def write_synced(path: Path, text: str) -> None:
    """Writes a text file and flushes it to the disk."""
    with naming(path), path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Writes a text file atomically, even if the power fails."""
    with atomic_file(path) as file:
        file.write(text.encode())


def _claim(out: Path, suffix: str, make: Callable[[Path], None]) -> tuple[Path, int]:
    """Makes a hidden file or folder for `out` and locks it. Returns its path and the descriptor that holds the lock."""
    while True:
        path = _hidden(out, suffix)
        make(path)
        with suppress(FileNotFoundError):  # removed as a leftover, before it was locked
            lock = os.open(path, os.O_RDONLY)
            if _lock(lock) is not False and _is_at(lock, path):
                return path, lock
            os.close(lock)


def _hidden(out: Path, suffix: str) -> Path:
    return out.with_name(f".{out.name}.{secrets.token_hex(8)}.{suffix}")


def _siblings(out: Path) -> list[Path]:
    """The hidden files and folders of `out`, of all processes."""
    pattern = re.compile(_HIDDEN.format(re.escape(out.name)))
    return [path for path in out.parent.iterdir() if pattern.fullmatch(path.name)]


def _remove_leftovers(out: Path) -> None:
    """Restores `out` if it was moved aside, and removes what killed processes left next to it."""
    recover(out)
    with suppress(OSError):
        for path in _siblings(out):
            with _locked(path) as dead:
                if dead and path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif dead:
                    path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Locks a file or folder while inside. Whether no process had locked it; False also where locks are missing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield False
        return
    try:
        yield bool(_lock(descriptor)) and _is_at(descriptor, path)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Whether the lock was free; None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step. Returns False where the system or the file system cannot."""
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))
