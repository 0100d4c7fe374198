"""One commit with all files of a model, in a repository that is made if it does not exist."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from blt.checkpoint import hub
from blt.share import card
from blt.share.contents import Item
from blt_runtime import reading
from blt_runtime.errors import HubError, UsageError

log = logging.getLogger("blt.share")
_CHECKPOINT = re.compile(r"(model|model-\d+-of-\d+)\.safetensors|model\.safetensors\.index\.json|model\.pt")
"""Weights in the root of a repository: those of an earlier upload, which a reader might prefer to the new ones."""


def check_name(name: str) -> None:
    """Raises UsageError unless `name` is one of a repository, MissingExtra without huggingface_hub."""
    library = hub.library("uploading and downloading need huggingface_hub, which")
    try:
        library.utils.validate_repo_id(name)
        valid = name.count("/") == 1
    except library.utils.HFValidationError:
        valid = False
    if not valid:
        raise UsageError(f"{name[:100]} is no name of a repository; write OWNER/NAME in letters, digits, - _ and .")


def check_token() -> None:
    """Raises HubError unless the user is logged in; the token is not tried."""
    if hub.library("uploading needs huggingface_hub, which").get_token() is None:
        raise HubError("uploading needs a token: `hf auth login`, or set HF_TOKEN")


def upload(
    name: str, items: Sequence[Item], *, message: str, private: bool = False, revision: str | None = None
) -> str:
    """Uploads the files in one commit and returns its address. A failed or interrupted upload leaves no commit.

    Weights or bundle files of an earlier upload that are not among `items` are deleted in the same commit, where new
    ones replace them.  private: a repository that is made here is private; one that exists must be.  revision: a
    branch, made if it does not exist. A card that was written by hand on the hub is kept if the new one was not.

    Raises HubError.
    """
    library = hub.library("uploading needs huggingface_hub, which")
    api = library.HfApi()
    with hub.failures(f"{name}: "):
        api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.repo_info(name).private:
            raise HubError(f"{name} exists and is public; make it private on its page, or leave --private out")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True)
        there = api.list_repo_files(name, revision=revision)
        if card.FILE in there and _is_written(items) and not _is_written_there(api, name, revision):
            log.info("the card of %s was written by hand and is kept; --card FILE replaces it", name)
            items = [item for item in items if item.name != card.FILE]
        adds = [library.CommitOperationAdd(item.name, item.source) for item in items]
        deletes = [library.CommitOperationDelete(old) for old in outdated(there, [item.name for item in items])]
        done = api.create_commit(name, [*adds, *deletes], commit_message=message, revision=revision)
    return str(done.commit_url)


def _is_written(items: Sequence[Item]) -> bool:
    """Whether the card among `items` is one of `card.render`."""
    return any(isinstance(item.source, bytes) and card.MARK.encode() in item.source for item in items)


def _is_written_there(api: Any, name: str, revision: str | None) -> bool:
    return card.MARK in reading.read_text(api.hf_hub_download(name, card.FILE, revision=revision))


def outdated(there: Sequence[str], new: Sequence[str]) -> list[str]:
    """The files of a repository that an upload of `new` replaces without overwriting them."""
    bundle, weights = f"{hub.BUNDLE}/", any(map(_CHECKPOINT.fullmatch, new))
    replaces_bundle = any(name.startswith(bundle) for name in new)
    return [
        name
        for name in there
        if name not in new
        and ((weights and _CHECKPOINT.fullmatch(name)) or (replaces_bundle and name.startswith(bundle)))
    ]
