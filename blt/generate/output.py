"""A file of records that a killed process leaves complete but for its last line, and that the next one continues.

Beside it, `NAME.state.json` describes what writes it. So records of two models, inputs or options are never mixed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from blt import files
from blt_runtime import reading
from blt_runtime.errors import UsageError

SCHEMA = "blt.batch/1"
FAILED = b', "error": "'
"""In every record with an error, and in no other: JSON escapes the quotes of a text."""


@dataclass(frozen=True)
class Output:
    """Where records go.

    write: appends a record, which is there from then on even if the process is killed. state: what the run drew, such
    as a seed. done: records that are there already. failed: those with an error.
    """

    write: Callable[[bytes], None]
    state: Mapping[str, Any]
    done: int = 0
    failed: int = 0


def state_path(path: Path) -> Path:
    """The file beside `path` with its state."""
    return path.with_name(f"{path.name}.state.json")


@contextmanager
def open_output(path: Path, run: Mapping[str, Any], drawn: Mapping[str, Any], *, force: bool) -> Iterator[Output]:
    """The records at `path`, to be continued.

    run: names what writes it; a run with another value of one key is refused. drawn: kept with the state of a new file,
    such as a seed. force: begin anew, whatever is there.
    Raises UsageError, with nothing changed, for a file that something else has written or that another process writes.
    """
    files.check_folder(path)
    with files.naming(path), _locked(path) as file:
        if force:
            file.truncate(0)
        if os.fstat(file.fileno()).st_size:
            state = _checked_state(path, run)
            done, failed = _continue(path, file)
        else:
            done, failed, state = 0, 0, {"schema": SCHEMA, **run, **drawn}
            files.replace_text(state_path(path), json.dumps(state, indent=2) + "\n")

        def write(content: bytes) -> None:
            file.write(content)
            file.flush()

        yield Output(write, state, done, failed)
        os.fsync(file.fileno())


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UsageError(f"{path} is not a plain file; give the name of one, or - for standard output")
    with os.fdopen(handle, "r+b") as file:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another process is writing {path}: wait for its end, or choose another name") from None
        except OSError as error:  # a file system without locks
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
        yield file


def _checked_state(path: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """The state of `path`. Raises UsageError unless it is that of this run."""
    anew = _anew(path)
    try:
        state = reading.read_json(state_path(path))
    except FileNotFoundError:
        raise UsageError(f"{path} exists and has no {state_path(path).name} beside it: {anew}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{state_path(path)} cannot be read ({reading.reason(error)}): {anew}") from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise UsageError(f"{state_path(path)} is not of this version ({SCHEMA}): {anew}")
    if other := list(_differences(state, run)):
        raise UsageError(f"{path} belongs to a run that differs in {', '.join(other)}: {anew}")
    return state


def _differences(state: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[str]:
    for key, value in run.items():
        before = state.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            names = [name for name in before | value if before.get(name, ...) != value.get(name, ...)]
            if names:
                yield f"{key} ({', '.join(names)})"
        elif before != value:
            yield key


def _continue(path: Path, file: BinaryIO) -> tuple[int, int]:
    """Cuts a torn last line off. Returns the number of records, and of those with an error."""
    done = failed = end = 0
    file.seek(0)
    for line in file:
        if not line.endswith(b"\n"):
            file.truncate(end)
            break
        if not line.startswith(b'{"index": %d, ' % done):
            raise UsageError(f"line {done + 1:,} of {path} is no record of this command: {_anew(path)}")
        done, failed, end = done + 1, failed + (FAILED in line), end + len(line)
    return done, failed


def _anew(path: Path) -> str:
    return f"choose another name, or replace {path} with --force"
