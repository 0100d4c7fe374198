"""Links are followed or named, loops end, pipes are never opened, and nothing is skipped silently."""

from __future__ import annotations

import os
import socket
from collections import Counter
from pathlib import Path

import pytest

from blt.data import Dataset, prepare
from blt_runtime.errors import InputError, UsageError


def everything(folder: Path) -> Counter[bytes]:
    train = Dataset(folder).split("train")
    return Counter(train.bytes(i) for i in range(len(train)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("own")
    return folder


def test_links_to_files_and_folders_are_followed(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b.txt").write_text("linked")
    (outside / "c.txt").write_text("linked file")
    (outside / "deeper").symlink_to(tmp_path / "far")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "d.txt").write_text("twice linked")
    (folder / "more").symlink_to(outside)
    (tmp_path / "e.txt").write_text("alone")
    (folder / "e.txt").symlink_to("../e.txt")
    prepare([folder], tmp_path / "data", split=(1, 0, 0))
    assert everything(tmp_path / "data") == Counter([b"own", b"linked", b"linked file", b"twice linked", b"alone"])


def test_a_link_to_text_that_is_read_is_named(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "0.txt").symlink_to("a.txt")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("sub")
    (folder / "again").symlink_to("sub")
    (folder / "sub" / "loop").symlink_to("..")
    prepare([folder], tmp_path / "data", split=(1, 0, 0))
    assert everything(tmp_path / "data") == Counter([b"own", b"sub"])
    for name, target in {"0.txt": "a.txt", "again": "sub", "sub/loop": ""}.items():
        assert f"{folder / name} (a link to {folder / target}, which is read already)" in caplog.text


def test_what_cannot_be_read_is_named_and_never_opened(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "gone.txt").symlink_to("/nowhere/at/all")
    (folder / "self.txt").symlink_to("self.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / "null.txt").symlink_to("/dev/null")
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
    prepare([folder], tmp_path / "data", split=(1, 0, 0))
    assert everything(tmp_path / "data") == Counter([b"own"])
    for text in (
        "gone.txt (a link to /nowhere/at/all: No such file",
        "self.txt (a link to self.txt: Too many levels",
        "pipe.txt (a pipe (FIFO)",
        "socket.txt (a socket",
        "null.txt (a device",
    ):
        assert text in caplog.text
    with pytest.raises(InputError, match=r"5 of 6 files cannot be read.*gone.txt: a link"):
        prepare([folder], tmp_path / "strict", strict=True)
    for name, message in {
        "pipe.txt": "is a pipe",
        "gone.txt": "a link that leads to no file",
        "null.txt": "a device",
    }.items():
        with pytest.raises(UsageError, match=message):
            prepare([folder / name], tmp_path / "strict")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_an_error(folder: Path, tmp_path: Path) -> None:
    (folder / "secret").mkdir(mode=0)
    (folder / "b.txt").touch(mode=0)
    with pytest.raises(InputError, match=r"2 of 3 files .*secret: Permission denied.*b.txt: cannot be opened"):
        prepare([folder], tmp_path / "data")


def test_an_unreadable_folder_is_an_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "secret").mkdir()
    scandir = os.scandir

    def denied(path: str | Path) -> object:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("blt.data.walk.os.scandir", denied)
    with pytest.raises(InputError, match=r"secret: Permission denied"):
        prepare([folder], tmp_path / "data")
