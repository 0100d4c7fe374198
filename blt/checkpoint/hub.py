"""Names on the Hugging Face hub, such as `facebook/blt-1b`: downloaded once into its cache, then read as a folder.

A repository may hold a checkpoint, a bundle in the folder `onnx`, or both (`blt.share` writes them). No torch: a bundle
on the hub runs without it.
"""

from __future__ import annotations

import errno
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blt_runtime.errors import BltError, CheckpointError, HubError, MissingExtra

BUNDLE = "onnx"
"""The folder of a repository that holds a bundle."""
WEIGHTS = "model.pt"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ("*.json", "*.safetensors")
_ENTROPY_FOLDERS = ("entropy_model", "blt-entropy")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REASONS = {
    401: "the hub does not accept your token: `hf auth login`, or set HF_TOKEN to a valid one",
    403: "your token does not allow this: give one with write access to this owner's repositories",
    404: "it is not on the hub",
    409: "it was changed on the hub at the same time; run the command again",
    412: "it was changed on the hub at the same time; run the command again",
    413: "the hub refuses files of this size",
    429: "too many requests; wait some minutes, then run the command again",
}


def is_name(path: str | Path) -> bool:
    """Whether an argument may be a hub name: `owner/name`, and there is no local folder `owner`."""
    text = str(path)
    return bool(_NAME.fullmatch(text)) and not Path(text).parent.exists() and Path(text).suffix != ".pt"


def resolve(path: str | Path) -> Path:
    """The local folder or file of a path or hub name. Raises CheckpointError, HubError, MissingExtra."""
    if Path(path).exists():
        return Path(path)
    if not is_name(path):
        raise CheckpointError(f"{path} does not exist")
    return download(str(path))


def download(name: str) -> Path:
    """The folder of a repository's configuration and weights, downloaded if the cache does not have them.

    A `model.pt` is read only from a repository without safetensors. Raises HubError, MissingExtra.
    """
    lead = _no_file(name)
    hub = library(f"{lead}to search the hub, huggingface_hub")
    with failures(lead):
        folder = Path(hub.snapshot_download(name, allow_patterns=list(_FILES), ignore_patterns=[f"{BUNDLE}/*"]))
        if not any(folder.glob("*.safetensors")):
            hub.snapshot_download(name, revision=folder.name, allow_patterns=[WEIGHTS])
    return folder


def find_bundle(name: str) -> Path | None:
    """The folder of a repository's bundle, downloaded if the cache does not have it; None if it has no bundle.

    Without a connection, what the cache holds is used. Raises HubError, MissingExtra.
    """
    lead = _no_file(name)
    hub = library(f"{lead}to search the hub, huggingface_hub")
    with failures(lead):
        try:  # the manifest first: a folder `onnx` of other programs is not downloaded
            root = Path(hub.snapshot_download(name, allow_patterns=[f"{BUNDLE}/manifest.json"]))
        except hub.errors.LocalEntryNotFoundError:
            if not _cached(hub, name):
                raise
            return None
        if not (root / BUNDLE / "manifest.json").exists():
            return None
        hub.snapshot_download(name, revision=root.name, allow_patterns=[f"{BUNDLE}/*"])
    return root / BUNDLE


def model_name(folder: Path) -> str:
    """What to call the bundle in a folder: its repository in the hub's cache, else the folder's name, not `onnx`.

    Example:
        hub.model_name(Path("hub/models--owner--name/snapshots/0a1b/onnx"))  # "owner/name"
    """
    path = folder.absolute()
    found = re.fullmatch(r".*/models--([^/]+)--([^/]+)/snapshots/[^/]+/" + BUNDLE, path.as_posix())
    if found is not None:
        return f"{found[1]}/{found[2]}"
    path = path.resolve()
    return path.parent.name if path.name == BUNDLE else path.name


def _no_file(name: str) -> str:
    return f"{name} is no local file or folder, and "


def _cached(hub: Any, name: str) -> bool:
    """Whether the cache holds anything of a repository."""
    return (Path(hub.constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots").is_dir()


def library(what: str) -> Any:
    """The module huggingface_hub; `what` needs it. Its bars are shown on a terminal only, its warnings never.

    Raises MissingExtra.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        from huggingface_hub.utils import logging as its_logging
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise MissingExtra(what, "hub") from None
    its_logging.set_verbosity_error()
    if not (sys.stderr.isatty() and logging.getLogger("blt").isEnabledFor(logging.INFO)):
        disable_progress_bars()
    return huggingface_hub


@contextmanager
def failures(lead: str) -> Iterator[None]:
    """Turns every failure of huggingface_hub, the network or the disk inside into one HubError that begins with `lead`.

    Example:
        with hub.failures("owner/name: "):
            huggingface_hub.snapshot_download("owner/name")
    """
    try:
        yield
    except BltError:
        raise
    except Exception as error:  # from huggingface_hub or its HTTP library: they share no base class
        raise HubError(f"{lead}{_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What went wrong, from an error and those that it was raised from."""
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, GatedRepoError):
            return "it is gated: accept its licence on its page on the hub, then `hf auth login` or set HF_TOKEN"
        if isinstance(cause, NoRevision):
            return "it has no such revision on the hub"
        if isinstance(cause, RepositoryNotFoundError):
            return "on the hub it does not exist or is private: `hf auth login`"
        if isinstance(cause, OfflineModeIsEnabled):
            return "it is not in the hub's cache, and HF_HUB_OFFLINE forbids to download it"
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return _REASONS.get(status, f"the hub answers {status}; try again later: {_line(cause)}")
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return f"the disk is full ({cause.filename or 'the cache of the hub'}): free some space, or set HF_HOME"
        if isinstance(cause, ValueError) and "README.md" in str(cause):
            return f"the hub refuses the model card: {' '.join(str(cause).split())}"
    return f"the hub cannot be reached: {_line(causes[-1])}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def find_entropy_model(path: str | Path, folder: Path) -> str | Path | None:
    """The entropy model of the BLT in `folder`, given as `path`: inside it, next to it, or a hub name of its owner."""
    inside, *_ = _ENTROPY_FOLDERS
    for candidate in (folder / inside, *(folder.absolute().parent / name for name in _ENTROPY_FOLDERS)):
        if candidate.is_dir():
            return candidate
    if not Path(path).exists() and is_name(path):
        return f"{str(path).split('/')[0]}/blt-entropy"
    return None
