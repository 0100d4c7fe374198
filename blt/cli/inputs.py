"""Reads the arguments of commands: text, ids, patch lengths, and the path of a model."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blt import files
from blt_runtime import reading
from blt_runtime.errors import InputError, UsageError

MODEL_FILES = ("manifest.json", "model.pt", "params.json", "config.json")
"""One of them is in every folder that holds a model; `blt.checkpoint.formats` looks into them."""
LARGEST_OPTION = 1 << 20
"""Bytes of a file that an option names."""


def text_bytes(text: str) -> bytes:
    """The bytes of a command-line argument; `-` is standard input. Bytes need not be valid UTF-8."""
    return sys.stdin.buffer.read() if text == "-" else os.fsencode(text)


def file_or_text(argument: str) -> bytes:
    """The bytes of the file that `argument` names, of standard input for `-`, else of the argument itself."""
    return Path(argument).read_bytes() if _names_a_file(argument) else text_bytes(argument)


def file_or_string(argument: str) -> str:
    """The text of the file that `argument` names, else the argument itself. Raises InputError for a file that is no
    UTF-8."""
    try:
        return Path(argument).read_text(encoding="utf-8") if _names_a_file(argument) else argument
    except UnicodeDecodeError as error:
        raise InputError(f"{argument} is no UTF-8 text: {error.reason} at byte {error.start}") from error


def text_file(path: Path, option: str) -> str:
    """The text of a small file that an option names. Raises InputError."""
    from blt_runtime import reading

    try:
        return reading.read_text(path, LARGEST_OPTION)
    except (OSError, ValueError) as error:
        raise InputError(f"{option}: cannot read {path}: {reading.reason(error)}") from error


def _names_a_file(argument: str) -> bool:
    try:
        return argument != "-" and Path(argument).is_file()
    except (OSError, ValueError):  # too long for a name, or with a NUL byte, so it is text
        return False


def read_file(argument: str) -> bytes:
    """The bytes of a file or of standard input (`-`). Raises UsageError if there is no such file, InputError if it is
    empty."""
    path = Path(argument)
    if argument != "-" and not path.is_file():
        raise UsageError(f"{argument}: no such file; give a file or - for standard input")
    data = sys.stdin.buffer.read() if argument == "-" else path.read_bytes()
    if not data:
        raise InputError(f"{'standard input' if argument == '-' else argument} is empty; give some text")
    return data


def existing_model(path: Path) -> Path:
    """`path`, which may be a name on the hub. Raises UsageError if nothing is there, or no finished model."""
    files.recover(path)
    if not path.exists():
        from blt.checkpoint.hub import is_name

        if is_name(path):
            return path
        raise UsageError(f"{path}: no such file or folder; give a checkpoint, a run folder, a bundle or a hub name")
    if is_bundle(path):
        from blt.data.dataset import is_data_folder

        if is_data_folder(path):
            raise UsageError(f"{path} is a data folder for training; give model.pt, a run folder or a bundle")
    elif (path / "checkpoints").is_dir():
        if not ((path / "model.pt").is_file() or any((path / "checkpoints").glob("step-*"))):
            raise UsageError(
                f"{path} is a training run that stopped before its first checkpoint: the same `blt train` command "
                "continues it"
            )
    elif path.is_dir() and not any((path / name).is_file() for name in MODEL_FILES):
        raise UsageError(f"{path} holds no model: {_why_no_model(path)}")
    return path


def prefer_bundle(path: Path) -> Path:
    """The bundle in the folder `onnx` of a folder or of a repository on the hub, downloaded; else `path`.

    Raises HubError, and MissingExtra without huggingface_hub.
    """
    if path.is_file() or is_bundle(path):
        return path
    from blt.checkpoint import hub

    if path.exists():
        return path / hub.BUNDLE if is_bundle(path / hub.BUNDLE) else path
    return hub.find_bundle(str(path)) or path if hub.is_name(path) else path


def _why_no_model(folder: Path) -> str:
    inside = sorted({file.parent.name for name in MODEL_FILES for file in folder.glob(f"*/{name}")})
    if inside:
        more = f" and {len(inside) - 5} more" if len(inside) > 5 else ""
        return f"it contains the folders {', '.join(inside[:5])}{more}; give one of them"
    return (
        "a bundle has manifest.json, a run folder model.pt, a folder in the facebook format params.json or "
        "config.json, a Hugging Face folder config.json"
    )


def is_bundle(path: Path) -> bool:
    """A bundle is a folder with a manifest and without the state of a training checkpoint."""
    return path.is_dir() and (path / "manifest.json").exists() and not (path / "state.json").exists()


def is_engines(path: Path) -> bool:
    """Whether the folder holds TensorRT engines (`blt build`); `is_bundle` holds for it too."""
    from blt_runtime.bundle import engines

    return engines.is_engines(path)


def refuse_engines(path: Path, instead: str) -> None:
    """Raises UsageError, which says what to give instead, if the folder holds TensorRT engines."""
    if is_engines(path):
        raise UsageError(f"{path} holds TensorRT engines: {instead}")


def load_ids(path: Path, vocab_size: int) -> NDArray[np.int64]:
    """Ids [N] from a .npy file. Raises InputError unless they are integers from 0 to `vocab_size` - 1."""
    array = _load_integers(path)
    if array.size == 0:
        raise InputError(f"{path} holds no ids")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        raise InputError(f"{path} holds ids from {low} to {high}; they must be in 0..{vocab_size - 1}")
    return array


def load_patch_lengths(path: Path, n_ids: int) -> NDArray[np.int64]:
    """Patch lengths [P] from a .npy file. Raises InputError unless the first is 1 and they sum to `n_ids` + 1."""
    array = _load_integers(path)
    array = array[: int(np.flatnonzero(array)[-1]) + 1] if array.any() else array  # without padding zeros
    if array.size == 0 or (array < 1).any():
        raise InputError(f"{path}: every patch length must be at least 1")
    if int(array.sum()) != n_ids + 1:
        raise InputError(f"{path}: patch lengths sum to {array.sum()}; {n_ids} ids need {n_ids + 1}")
    if array[0] != 1:
        raise InputError(f"{path}: the first patch holds the first id alone, so its length is 1, not {array[0]}")
    return array


def _load_integers(path: Path) -> NDArray[np.int64]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        array = reading.read_array(path)
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is no .npy file: {reading.reason(error)}") from error
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{path} must hold one array of whole numbers")
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1:
        raise InputError(f"{path} must be one-dimensional, not {array.ndim}-dimensional")
    return np.asarray(array, dtype=np.int64)
