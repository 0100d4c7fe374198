"""Names on the hub: what is treated as a name, and every failure of a download is one clear error."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blt.checkpoint import hub
from blt.checkpoint.models import load, save
from blt_runtime.errors import CheckpointError, HubError, MissingExtra
from tests.checkpoint.facebook import forced_window, write_facebook
from tests.tiny import tiny

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the hub extra is not installed")


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub.is_name("facebook/blt-1b")
    for path in ("runs/demo", "model.pt", "a/b/c", "../a", "/a/b", "a/b.pt", "./a", "a/", "-a/b"):
        assert not hub.is_name(path), path
        with pytest.raises(CheckpointError, match="does not exist"):
            hub.resolve(path)


def serve(monkeypatch: pytest.MonkeyPatch, download: Callable[..., str]) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_a_name_and_the_entropy_model_of_the_same_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloaded = []

    def download(name: str, allow_patterns: list[str], **_: object) -> str:
        downloaded.append(name)
        assert "*.safetensors" in allow_patterns
        assert not any(pattern.endswith((".pt", ".pth", ".bin", ".py")) for pattern in allow_patterns)
        return str(tmp_path / name.replace("/", "--"))

    write_facebook(tmp_path, tiny(), "hub")
    (tmp_path / "blt").rename(tmp_path / "facebook--blt-1b")
    (tmp_path / "entropy_model").rename(tmp_path / "facebook--blt-entropy")
    serve(monkeypatch, download)
    checkpoint = load("facebook/blt-1b")
    assert downloaded == ["facebook/blt-1b", "facebook/blt-entropy"]
    assert checkpoint.entropy is not None
    assert checkpoint.patch_rule == tiny().patch_rule


FAILURES = {
    "gated": ("GatedRepoError", "is gated: accept its licence"),
    "unknown": ("RepositoryNotFoundError", "does not exist or is private"),
    "server": ("HfHubHTTPError", "the hub cannot be reached"),
    "offline": ("LocalEntryNotFoundError", "the hub cannot be reached"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_download_is_one_clear_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, message = FAILURES[name]
    error = getattr(huggingface_hub.errors, kind)
    raised = error.__new__(error, "out of order")  # its __init__ needs an HTTP response

    def download(*_: object, **__: object) -> str:
        raise raised

    serve(monkeypatch, download)
    with pytest.raises(HubError, match=message) as caught:
        load("facebook/blt-1b")
    assert "\n" not in str(caught.value)


def test_a_broken_connection_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class RemoteProtocolError(Exception):
        """Like that of httpx, which is not an OSError."""

    def download(*_: object, **__: object) -> str:
        raise RemoteProtocolError("peer closed connection\nfor more information ...")

    serve(monkeypatch, download)
    with pytest.raises(HubError, match=r"the hub cannot be reached: peer closed connection$"):
        load("facebook/blt-1b")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"blt-lm\[hub\]"):
        load("facebook/blt-1b")


def test_an_entropy_model_is_searched_for_only_if_the_rule_needs_one(tmp_path: Path) -> None:
    write_facebook(tmp_path, forced_window(tiny()))
    save(tmp_path / "space.pt", tiny("no_hash_space_causal_latent"))
    assert load(tmp_path / "space.pt").entropy is None
    assert load(tmp_path / "blt").entropy is not None


def test_a_bundle_in_the_cache_has_the_name_of_its_repository_and_others_that_of_their_folder(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--a-name" / "snapshots" / "0a1b"
    assert hub.model_name(snapshot / "onnx") == "owner/a-name"
    assert hub.model_name(tmp_path / "pulled" / "onnx") == "pulled"
    assert hub.model_name(tmp_path / "bundle") == "bundle"


def test_a_full_disk_is_named_also_as_the_cause_of_another_error() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/cache/blob")
    wrapped = RuntimeError("Error while downloading")
    wrapped.__cause__ = full
    for error in (full, wrapped):
        with (
            pytest.raises(HubError, match=r"^a/b: the disk is full \(/cache/blob\): free some space"),
            hub.failures("a/b: "),
        ):
            raise error


def test_the_projects_own_errors_pass_unchanged() -> None:
    with pytest.raises(CheckpointError, match=r"^mine$"), hub.failures("a/b: "):
        raise CheckpointError("mine")
