"""Files of an open bundle that are mapped into memory: whether they are still what they were.

A mapped file is read when a page of it is first used, which may be hours after it was checked. If another program
overwrites it in place, the output changes. If it is cut, the system ends the process (SIGBUS), which Python cannot
catch. So `OpenFiles.check` is called before the pages are used. Replacing a file or the whole folder by renaming, as
`blt export --force` does, is harmless: the old file lives until it is closed.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable

from ..errors import BundleError
from .bundle import Bundle


class OpenFiles:
    """The weights and hash tables of a bundle, each held open; they are closed with the object.

    names: the files to hold; None holds all but the graphs. `check` costs one system call for each file, 4 us in all.
    Raises BundleError if a file cannot be opened.
    """

    def __init__(self, bundle: Bundle, names: Iterable[str] | None = None) -> None:
        graphs = {ref.file for refs in (bundle.manifest.graphs, bundle.manifest.row_graphs) for ref in refs.values()}
        self._folder = bundle.path
        self._held: list[tuple[str, int, tuple[int, int]]] = []
        self._close = weakref.finalize(self, _close, self._held)
        for name in sorted(set(bundle.manifest.files) - graphs if names is None else names):
            path = bundle.path / name
            try:
                descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
            except OSError as error:
                raise BundleError(f"cannot read {path}: {error.strerror}") from error
            info = os.fstat(descriptor)
            self._held.append((name, descriptor, (bundle.manifest.files[name].bytes, info.st_mtime_ns)))
        self.check()

    def check(self) -> None:
        """Raises BundleError if a file has another size, or was written to since the bundle was opened."""
        for name, descriptor, (size, modified) in self._held:
            info = os.fstat(descriptor)
            if info.st_size != size or info.st_mtime_ns != modified:
                how = f"has {info.st_size} bytes instead of {size}" if info.st_size != size else "was written to"
                raise BundleError(f"{name} in {self._folder} {how} while the bundle was open: open it again")

    def check_names(self) -> None:
        """Raises BundleError if a name now belongs to another file, so that the backend may have read that one."""
        for name, descriptor, _ in self._held:
            try:
                same = os.path.samestat((self._folder / name).stat(), os.fstat(descriptor))
            except OSError:
                same = False
            if not same:
                raise BundleError(f"{name} in {self._folder} was replaced while the bundle was opened: open it again")


def _close(held: list[tuple[str, int, tuple[int, int]]]) -> None:
    for _, descriptor, _ in held:
        os.close(descriptor)
