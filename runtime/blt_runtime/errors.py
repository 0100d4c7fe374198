"""All errors of the project, in one tree. Each message is one line: what is wrong, and what to do.

    BltError                   exit code 1
    ├── UsageError             2   bad arguments, wrong order of calls, two threads on one stream
    ├── InputError             2   prompt, text or data that cannot be used
    ├── ConfigError            2   unknown or misspelt key, sizes that do not divide
    │   └── RuleError          2   a patch rule that contradicts itself
    ├── CheckpointError        1   not a checkpoint, truncated, foreign content
    ├── BundleError            1   missing, changed, truncated or outward-pointing file
    │   ├── ManifestError      1   manifest.json is broken, incomplete or has unknown keys
    │   └── VersionError       1   made by a newer version of the format
    ├── HubError               1   the hub cannot be reached, or refuses a download or an upload
    ├── CapacityError          1   the stream is full
    ├── OutOfMemory            1   memory that could not be allocated
    ├── QueueFull              1   a scheduler has too many requests
    ├── Cancelled              1   the caller stopped a call half-way; nothing has changed
    ├── BackendError           4   a backend or device failed or is missing
    │   └── MissingExtra       4   a library is not installed; the message names the command
    └── CheckFailed            3   parity or a threshold that the user set

`exit_code` is what the command line returns for the class.
"""

from __future__ import annotations

import difflib
import itertools
import unicodedata
from collections.abc import Iterable, Mapping

LONGEST_MESSAGE = 4000
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


class BltError(Exception):
    """Base of all errors of this project.

    Example:
        try:
            model = Model.open("bundle")
        except BltError as error:
            sys.exit(f"{error}")  # one line: what is wrong, and what to do
    """

    exit_code = 1

    def __str__(self) -> str:
        """The message, printable and of bounded length: it may quote a file that somebody else wrote."""
        text = super().__str__()
        if len(text) > LONGEST_MESSAGE:
            text = f"{text[: LONGEST_MESSAGE // 2]} ... {text[-LONGEST_MESSAGE // 2 :]}"
        return printable(text.replace("\r", " ").replace("\n", " "))


class UsageError(BltError):
    """Bad arguments or calls in the wrong order."""

    exit_code = 2


class InputError(BltError):
    """A prompt, text or data file that cannot be used."""

    exit_code = 2


class ConfigError(BltError):
    """A configuration with an unknown key or values that do not fit together."""

    exit_code = 2


class RuleError(ConfigError):
    """A patch rule that contradicts itself."""


class CheckpointError(BltError):
    """A file that is not a checkpoint, or a damaged one."""


class BundleError(BltError):
    """A bundle with a missing, changed, truncated or outward-pointing file."""


class ManifestError(BundleError):
    """A manifest.json that is broken, incomplete or has unknown keys."""


class VersionError(BundleError):
    """A bundle written in a newer version of the format."""


class HubError(BltError):
    """A hub that cannot be reached, or that refuses a download or an upload."""


class CapacityError(BltError):
    """The stream cannot hold more bytes or patches."""


class OutOfMemory(BltError):
    """Memory that could not be allocated."""


class QueueFull(BltError):
    """A scheduler whose queue of requests is full."""


class Cancelled(BltError):
    """A call that its caller stopped half-way: the stream is what it was before."""


class BackendError(BltError):
    """A backend or device that failed or is missing."""

    exit_code = 4


RUNTIME_EXTRAS = ("cpu", "gpu", "tensorrt", "ort-trt", "webgpu", "serve", "grammar")
"""The extras of the distribution blt-runtime. All others are extras of blt-lm."""


def install_command(extra: str) -> str:
    """What installs an extra.

    Example:
        install_command("cpu")  # "pip install 'blt-runtime[cpu]'"
        install_command("plot")  # "pip install 'blt-lm[plot]'"
    """
    distribution = "blt-runtime" if extra in RUNTIME_EXTRAS else "blt-lm"
    return f"pip install '{distribution}[{extra}]'"


class MissingExtra(BackendError):
    """A library that is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed: {install_command(extra)}")
        self.what, self.extra = what, extra

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str]]:
        """Pickled as its arguments: processes pass errors to each other."""
        return type(self), (self.what, self.extra)


class CheckFailed(BltError):
    """A check that ran and found a difference (parity, a threshold set by the user)."""

    exit_code = 3


def nearest(word: str, known: Iterable[str]) -> str:
    """The tail of an error message: the nearest known word, or all of them."""
    words = sorted(known)
    close = difflib.get_close_matches(word[:100], words, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(words)}"


def printable(text: str) -> str:
    """The text with control, format and other unprintable characters escaped, for a terminal: ESC becomes `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in _UNSEEN else c for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode()


def shown(value: object, limit: int = 60) -> str:
    """A value for a message: one printable line of about `limit` characters, whatever its type, size and depth.

    `repr` would take as long as the value is large, and forever for lists that share their elements.
    """
    text = _shown(value, limit, 2)
    return text if len(text) <= limit + 3 else f"{text[:limit]}..."


def _shown(value: object, limit: int, levels: int) -> str:
    if isinstance(value, str | bytes | bytearray):
        return repr(value[: limit + 1])
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a whole number of {value.bit_length():,} bits"
    if value is None or isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple | Mapping):
        return _shown_items(value, limit, levels)
    return f"a value of the type {type(value).__name__}"


def _shown_items(value: list[object] | tuple[object, ...] | Mapping[object, object], limit: int, levels: int) -> str:
    first, last = "{}" if isinstance(value, Mapping) else "[]" if isinstance(value, list) else "()"
    if levels == 0:
        return f"{first}...{last}" if value else first + last
    some = [
        _shown(item, limit, levels - 1)
        if not isinstance(value, Mapping)
        else f"{_shown(item, limit, levels - 1)}: {_shown(value[item], limit, levels - 1)}"
        for item in itertools.islice(value, 6)
    ]
    return first + ", ".join([*some, *(["..."] if len(value) > len(some) else [])]) + last
