"""Names on the Hugging Face hub, such as `facebook/blt-1b`: downloaded once into its cache, then read as a folder."""

from __future__ import annotations

import re
from pathlib import Path

from blt_runtime.errors import CheckpointError, MissingExtra

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ("*.json", "*.safetensors")
_ENTROPY_FOLDERS = ("entropy_model", "blt-entropy")


def is_name(path: str | Path) -> bool:
    """Whether an argument may be a hub name: `owner/name`, and there is no local folder `owner`."""
    text = str(path)
    return bool(_NAME.fullmatch(text)) and not Path(text).parent.exists() and Path(text).suffix != ".pt"


def resolve(path: str | Path) -> Path:
    """The local folder or file of a path or hub name. Raises CheckpointError, MissingExtra."""
    if Path(path).exists():
        return Path(path)
    if not is_name(path):
        raise CheckpointError(f"{path} does not exist")
    return download(str(path))


def download(name: str) -> Path:
    """The folder of a repository's configuration and weights, downloaded if the cache does not have them."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError:
        raise MissingExtra(f"{name} is no local file or folder; to search the hub, huggingface_hub", "hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except GatedRepoError:
        raise CheckpointError(
            f"{name} is gated: accept its licence on its page on the hub, then `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{name} is no local file or folder, and on the hub it does not exist or is private: `hf auth login`"
        ) from None
    except Exception as error:  # from huggingface_hub or its HTTP library: they share no base class
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{name} is no local file or folder, and the hub cannot be reached: {reason}") from None


def find_entropy_model(path: str | Path, folder: Path) -> str | Path | None:
    """The entropy model of the BLT in `folder`, given as `path`: inside it, next to it, or a hub name of its owner."""
    inside, *_ = _ENTROPY_FOLDERS
    for candidate in (folder / inside, *(folder.absolute().parent / name for name in _ENTROPY_FOLDERS)):
        if candidate.is_dir():
            return candidate
    if not Path(path).exists() and is_name(path):
        return f"{str(path).split('/')[0]}/blt-entropy"
    return None
