"""Figures that a command writes: the name is checked before the work, the file is written after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from blt import files
from blt.cli import console
from blt_runtime.errors import UsageError

Figure = TypeVar("Figure")


def check_path(path: Path | None, option: str = "--plot") -> None:
    """Raises UsageError unless `path` is None or a .png or .html file in a folder that exists."""
    if path is None:
        return
    if path.suffix.lower() not in (".png", ".html"):
        raise UsageError(f"{option} {path}: the name must end in .png or .html")
    files.check_folder(path)


def write(path: Path, figure: Figure, render: Callable[[Figure, str], bytes]) -> None:
    """Writes what `render` makes of `figure` in the format that the name ends in."""
    files.check_folder(path)
    with files.atomic_file(path) as file:
        file.write(render(figure, path.suffix.lower().removeprefix(".")))
    console.log.info("wrote %s", path)
