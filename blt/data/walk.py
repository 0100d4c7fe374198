"""The files of a folder, in an order that depends only on names. Links are followed; whatever is not read is named.

A link is left out if its target is read anyway under its own name, so no text is read twice and loops end. Pipes,
sockets and devices are never opened.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

_KINDS = (
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@dataclass
class Found:
    """files: to be read, sorted.  left_out: path and reason of other entries.  unreadable: path and error.  hidden: the
    entries whose names begin with a dot."""

    files: list[Path] = field(default_factory=list)
    left_out: list[tuple[Path, str]] = field(default_factory=list)
    unreadable: list[tuple[Path, str]] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)


def special(mode: int) -> str | None:
    """What a file that is neither regular nor a folder is, with an article."""
    return next((name for test, name in _KINDS if test(mode)), None)


def walk(folder: Path) -> Found:
    """Everything in `folder`, at any depth."""
    found = Found()
    seen: dict[tuple[int, int], Path] = {}
    links = _read(folder, found, seen)
    for link in links:  # grows while links to folders are followed
        try:
            status = link.stat()
        except OSError as error:
            found.left_out.append((link, _dangling(link, error)))
            continue
        known = seen.get((status.st_dev, status.st_ino))
        if known is not None:
            found.left_out.append((link, f"a link to {known}, which is read already"))
        elif stat.S_ISDIR(status.st_mode):
            links += _read(link, found, seen)
        else:
            _add(link, status, found, seen)
    found.files.sort()
    return found


def _read(folder: Path, found: Found, seen: dict[tuple[int, int], Path]) -> list[Path]:
    """Adds the entries of a folder and its subfolders, and returns the links among them, sorted."""
    links: list[Path] = []
    todo = [folder]
    while todo:
        here = todo.pop()
        try:
            status = here.stat()
            seen[status.st_dev, status.st_ino] = here
            with os.scandir(here) as entries:
                paths = sorted(here / entry.name for entry in entries)
        except OSError as error:
            found.unreadable.append((here, error.strerror or str(error)))
            continue
        for path in paths:
            try:
                status = path.lstat()
            except OSError as error:
                found.unreadable.append((path, error.strerror or str(error)))
                continue
            if path.name.startswith("."):
                found.hidden.append(path)
            elif stat.S_ISLNK(status.st_mode):
                links.append(path)
            elif stat.S_ISDIR(status.st_mode):
                todo.append(path)
            else:
                _add(path, status, found, seen)
    return sorted(links)


def _add(path: Path, status: os.stat_result, found: Found, seen: dict[tuple[int, int], Path]) -> None:
    kind = special(status.st_mode)
    if kind is not None:
        found.left_out.append((path, f"{kind}, not a file"))
    else:
        seen[status.st_dev, status.st_ino] = path
        found.files.append(path)


def _dangling(link: Path, error: OSError) -> str:
    try:
        target = str(link.readlink())
    except OSError:
        target = "another file"
    return f"a link to {target}: {error.strerror}"
