"""Opens files that nobody has vouched for: plain files only, of a bounded size, with strict JSON and .npy headers.

A FIFO or a device in the place of a file would block or never end, a link could lead out of a folder, and a few bytes
of JSON or of a header can claim gigabytes. Every reader of manifests, configurations, indexes and arrays uses these
functions. They raise OSError for a file that cannot be used (`strerror` is the reason) and ValueError for its content;
the caller adds the path and the advice.

The rule for links in a folder of files (a checkpoint): a link may lead to a file in the same folder, or into the
`blobs` of the hub cache that holds the folder. A hard link is a plain file.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import shown

LARGEST = 16 << 20
"""Most bytes of a JSON or YAML file."""
LARGEST_LOG = 1 << 30
"""Most bytes of a run's metrics: millions of steps."""
MOST_VALUES = 1 << 20
"""Most values in a JSON file: each takes up to 250 bytes of memory."""
DEEPEST = 64
DIGITS = 20
"""Most characters of a whole number: those of a 64-bit one."""
LONGEST_HEADER = 10_000
"""Most bytes of the header of a .npy file, as in numpy."""
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_MAGIC = b"\x93NUMPY"


def reason(error: OSError | ValueError) -> str:
    """What an error of these functions says, without the path."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def open_plain(path: str | Path) -> io.BufferedReader:
    """Opens a plain file for reading. Raises OSError, also for a FIFO, a device or a folder; it never blocks."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a plain file", str(path))


def check_plain(path: str | Path) -> None:
    """Raises OSError unless `path` is a plain file that can be read: for libraries that open a file themselves."""
    open_plain(path).close()


def in_folder(folder: Path, name: str) -> Path:
    """The file `name` of a folder. Raises OSError if it is a link that leaves the folder and its hub cache."""
    path = folder / name
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()) and not in_hub_cache(path):
        raise OSError(errno.EPERM, "it is a link to a file outside its folder, which is refused", str(path))
    return path


def in_hub_cache(link: Path) -> bool:
    """Whether a link is one of the Hugging Face cache: from REPOSITORY/snapshots/REV/... to a plain file in
    REPOSITORY/blobs."""
    try:
        folder, target = link.parent.resolve(), Path(os.path.normpath(link.parent.resolve() / link.readlink()))
        blobs = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
        return target.parent in blobs and target.resolve() == target and target.is_file()
    except (OSError, RuntimeError, ValueError):  # gone, a circle of links, a name that no file can have
        return False


def read_bytes(path: str | Path, largest: int = LARGEST) -> bytes:
    """The content of a plain file. Raises OSError, also for more than `largest` bytes."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(largest + 1) if size <= largest else b""
    if size > largest or len(data) > largest:
        raise OSError(errno.EFBIG, f"more than {largest:,} bytes, too large for a file of this kind", str(path))
    return data


def read_text(path: str | Path, largest: int = LARGEST) -> str:
    """The text of a plain file in UTF-8. Raises OSError and ValueError."""
    return read_bytes(path, largest).decode("utf-8")


def read_json(path: str | Path, *, finite: bool = True) -> Any:
    """The value in a JSON file, as `parse_json`. Raises OSError and ValueError."""
    return parse_json(read_bytes(path), finite=finite)


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """A JSON value. Raises ValueError for invalid text and for what no file of this project needs.

    That is: a repeated key, more than `MOST_VALUES` values or `DEEPEST` levels, a whole number beyond 64 bits, and half
    of a surrogate pair.  finite: NaN and infinities are refused, too.
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    if sum(map(text.count, "[{,")) > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES:,} values")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_whole,
            parse_float=_finite if finite else float,
            parse_constant=_finite if finite else float,
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    _check_depth(value)
    if _HALF_PAIR.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return value


def refused_place(text: str | bytes) -> str | None:
    """The path of the first value in a JSON object that `parse_json` refuses for itself, such as `messages.0.content`;
    None if the text is refused as a whole."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        if sum(map(text.count, "[{,")) > MOST_VALUES:
            return None
        value = json.loads(
            text, parse_int=_marked(_whole), parse_float=_marked(_finite), parse_constant=_marked(_finite)
        )
    except (ValueError, RecursionError):
        return None
    path = next(_refused(value, ()), ())
    return ".".join(map(str, path)) if path else None


_REFUSED = object()


def _marked(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read`, with a mark in place of an error."""

    def hook(digits: str) -> Any:
        try:
            return read(digits)
        except ValueError:
            return _REFUSED

    return hook


def _refused(value: Any, path: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    if value is _REFUSED or (isinstance(value, str) and not _encodable(value)):
        yield path
    elif isinstance(value, dict | list) and len(path) < DEEPEST:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str) and not _encodable(key):
                yield path
            yield from _refused(item, (*path, key))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"the whole number {digits[:8]}... has {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{shown(digits)} is not a finite number")
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [item for part in level for item in _items(part)]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")


def _items(value: Any) -> Iterator[Any]:
    return iter(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())


def read_array(path: str | Path, *, mapped: bool = False) -> npt.NDArray[Any]:
    """The array in a .npy file, read-only and memory-mapped if `mapped`. No pickle is read.

    Raises OSError, and ValueError unless the file holds exactly the array of its header, which is checked before
    memory is allocated.
    """
    with open_plain(path) as file:
        shape, by_columns, dtype = _array_header(file)
        begin, size = file.tell(), os.fstat(file.fileno()).st_size
        if begin + math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"its header claims {shown(list(shape))} of {dtype}, which is not the size of the file")
        order: Any = "F" if by_columns else "C"
        if mapped and size > begin:
            return np.memmap(file, dtype, "r", begin, shape, order)
        return np.fromfile(file, dtype, math.prod(shape)).reshape(shape, order=order)


def _array_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it is stored by columns, and dtype."""
    start = file.read(8)
    if start[:6] != _MAGIC or start[6:] not in (b"\x01\x00", b"\x02\x00"):
        raise ValueError("it does not begin as a .npy file of version 1 or 2")
    kind = "<H" if start[6] == 1 else "<I"
    length = file.read(struct.calcsize(kind))
    if len(length) != struct.calcsize(kind) or struct.unpack(kind, length)[0] > LONGEST_HEADER:
        raise ValueError(f"its header is cut off, or longer than {LONGEST_HEADER:,} bytes")
    file.seek(8)
    read = np.lib.format.read_array_header_1_0 if start[6] == 1 else np.lib.format.read_array_header_2_0
    try:
        shape, by_columns, dtype = read(file, LONGEST_HEADER)
    except Exception as error:  # numpy tokenises and parses a Python literal: its errors share no base class
        raise ValueError("its header is damaged") from error
    if dtype.hasobject or dtype.itemsize == 0 or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError("its header describes no array of numbers")
    return shape, by_columns, dtype
