"""Names on the Hugging Face hub, as `facebook/blt-1b`: downloaded once into its cache, then a folder like any other."""

from __future__ import annotations

import re
from pathlib import Path

from blt_runtime.errors import CheckpointError, MissingExtra

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ("*.json", "*.safetensors")
_BESIDE = ("entropy_model", "blt-entropy")


def is_name(path: str | Path) -> bool:
    """Whether an argument that is no path may be a name: two words and a slash, and no folder of the first one here."""
    text = str(path)
    return bool(_NAME.fullmatch(text)) and not Path(text).parent.exists() and Path(text).suffix != ".pt"


def resolve(path: str | Path) -> Path:
    """The folder or file that an argument stands for. Raises CheckpointError, MissingExtra."""
    if Path(path).exists():
        return Path(path)
    if not is_name(path):
        raise CheckpointError(f"{path} does not exist")
    return download(str(path))


def download(name: str) -> Path:
    """A repository's configuration and weights, from the cache where they are there already."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError:
        raise MissingExtra(f"{name} is no file or folder here; to look on the hub, huggingface_hub", "hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except GatedRepoError:
        raise CheckpointError(
            f"{name} is gated: accept its licence on its page on the hub, then `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{name} is no file or folder here, and on the hub it does not exist, or is private: `hf auth login`"
        ) from None
    except Exception as error:  # its own, or those of the HTTP library of its version: they have no common base
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{name} is no file or folder here, and the hub cannot be reached: {reason}") from None


def entropy_beside(path: str | Path, folder: Path) -> str | Path | None:
    """The entropy model of the BLT in `folder`, asked for as `path`: inside it, beside it, or of the same owner."""
    for candidate in (folder / _BESIDE[0], *(folder.absolute().parent / name for name in _BESIDE)):
        if candidate.is_dir():
            return candidate
    if not Path(path).exists() and is_name(path):
        return f"{str(path).split('/')[0]}/blt-entropy"
    return None
