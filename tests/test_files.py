"""Outputs appear complete or not at all, whenever a process is killed, and leftovers of dead processes go."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blt import files
from blt_runtime.errors import UsageError

MODES = ["exchanged", "renamed"]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With and without a system that exchanges two names in one step."""
    if request.param == "renamed":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    return str(request.param)


def write(out: Path, text: str) -> None:
    with files.staged(out) as folder:
        (folder / "a").write_text(text)
        (folder / "b").write_text(text)


def content(out: Path) -> list[str]:
    return [(out / name).read_text() for name in ("a", "b")]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_replaces_an_older_one_whole(tmp_path: Path, mode: str) -> None:
    out = tmp_path / "out"
    write(out, "one")
    (out / "stale").write_text("x")
    write(out, "two")
    assert names(out) == ["a", "b"]
    assert content(out) == ["two", "two"]
    assert names(tmp_path) == ["out"]


def test_a_block_that_raises_changes_nothing(tmp_path: Path, mode: str) -> None:
    write(tmp_path / "out", "one")
    with pytest.raises(KeyError), files.staged(tmp_path / "out"):
        raise KeyError
    with pytest.raises(KeyError), files.atomic_file(tmp_path / "file"):
        raise KeyError
    assert names(tmp_path) == ["out"]
    assert content(tmp_path / "out") == ["one", "one"]


# Kills itself with SIGKILL at the n-th operation on the file system, for every n until the block ends.
KILLS = """
import os, signal, sys, json
from pathlib import Path
from blt import files

top, mode = Path(sys.argv[1]), sys.argv[2]
if mode == "renamed":
    files._exchange = lambda one, other: False
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree",
          "fcntl.flock"}

def write(out, text):
    with files.staged(out) as folder:
        for name in "ab":
            (folder / name).write_text(text)
    with files.atomic_file(out.with_name("file")) as file:
        file.write(text.encode())

seen = {"absent": 0, "points": 0, "left": 0}
done = False
while not done:
    out = top / str(seen["points"]) / "out"
    write(out, "one")
    child = os.fork()
    if child == 0:
        left = seen["points"]
        def hook(event, arguments):
            global left
            if event in EVENTS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        write(out, "two")
        os._exit(0)
    done = os.waitpid(child, 0)[1] == 0
    seen["points"] += 1
    seen["left"] += len(list(out.parent.iterdir())) > 2
    seen["absent"] += not out.exists()
    files.recover(out)
    assert {(out / name).read_text() for name in "ab"} in ({"one"}, {"two"}), list(out.parent.iterdir())
    assert out.with_name("file").read_text() in ("one", "two")
    write(out, "three")
    assert sorted(p.name for p in out.parent.iterdir()) == ["file", "out"], list(out.parent.iterdir())
    assert (out / "b").read_text() == "three"
print(json.dumps(seen))
"""


@pytest.mark.parametrize("mode", MODES)
def test_a_kill_at_any_moment_leaves_the_old_output_or_the_new_one(tmp_path: Path, mode: str) -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}\n{KILLS}"
    done = subprocess.run([sys.executable, "-c", code, tmp_path, mode], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["points"] > 15
    assert seen["left"] > 5
    if mode == "renamed":
        assert 1 <= seen["absent"] <= 3  # between the two renames; `recover` restores it
    elif exchanges(tmp_path):
        assert seen["absent"] == 0


def exchanges(folder: Path) -> bool:
    (folder / "x").touch()
    (folder / "y").touch()
    return files._exchange(folder / "x", folder / "y")


@pytest.mark.parametrize("name", ["0123456789abcdef", "10"], ids=["ours", "an earlier version's"])
def test_leftovers_of_dead_processes_are_removed_and_other_files_are_not(tmp_path: Path, name: str) -> None:
    for suffix in ("part", "tmp", "old"):
        (tmp_path / f".out.{name}.{suffix}").mkdir()
        (tmp_path / f".out.{name}.{suffix}" / "weights").write_text("half")
    (tmp_path / f".file.{name}.part").write_text("half")
    kept = [".out.part", ".out.notes.part", f".other.{name}.part", f"out.{name}.part", f".out.x.{name}.part"]
    for other in kept:
        (tmp_path / other).touch()
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "new")
    files.replace_text(tmp_path / "file", "new")
    assert names(tmp_path) == sorted([*kept, "file", "out"])


def test_processes_of_one_number_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Two containers with a common folder: each process has the number 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    out = tmp_path / "out"
    with files.staged(out) as one:
        (one / "a").write_text("one")
        (one / "b").write_text("one")
        with files.staged(out) as two:
            assert one != two
            assert (one / "a").exists()
            (two / "a").write_text("two")
            (two / "b").write_text("two")
        assert content(out) == ["two", "two"]
        assert (one / "a").exists()
    assert content(out) == ["one", "one"]
    assert names(tmp_path) == ["out"]


def test_two_writers_of_one_file_do_not_collide(tmp_path: Path) -> None:
    with files.atomic_file(tmp_path / "a") as one:
        files.replace_text(tmp_path / "a", "two")
        one.write(b"one")
    assert (tmp_path / "a").read_text() == "one"
    assert names(tmp_path) == ["a"]


def test_the_older_folder_comes_back_if_the_new_one_cannot_be_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    write(tmp_path / "out", "one")
    rename = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path.suffix == ".part":
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    def full(*_: object) -> bool:
        if mode == "renamed":
            return False
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", fails)
    monkeypatch.setattr(files, "_exchange", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "out", "two")
    assert content(tmp_path / "out") == ["one", "one"]
    assert names(tmp_path) == ["out"]


def test_the_newest_folder_that_was_moved_aside_is_restored(tmp_path: Path) -> None:
    for age, text in enumerate(("newest", "older")):
        folder = tmp_path / f".out.{age}.old"
        folder.mkdir()
        (folder / "a").write_text(text)
        os.utime(folder, (1000 - age, 1000 - age))
    files.recover(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "newest"
    files.recover(tmp_path / "nothing")
    assert names(tmp_path) == [".out.1.old", "out"]


def test_without_locks_no_leftover_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none: a leftover may be in use there."""
    (tmp_path / ".out.0123456789abcdef.part").mkdir()
    monkeypatch.setattr(files, "_lock", lambda descriptor: None)
    write(tmp_path / "out", "one")
    write(tmp_path / "out", "two")
    assert content(tmp_path / "out") == ["two", "two"]
    assert names(tmp_path) == [".out.0123456789abcdef.part", "out"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write to"), files.staged(tmp_path / "file" / "out"):
        pass
