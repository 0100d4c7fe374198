"""A long array on disk: kill -9, a full disk, two processes at once, and files that do not fit."""

from __future__ import annotations

import logging
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from blt.data.cache_files import create_file, fill_array
from blt_runtime.errors import InputError

LENGTH, STEP = 1000, 64


def values(done: int) -> Iterator[np.ndarray]:
    whole = np.arange(LENGTH, dtype=np.float32)
    for start in range(done, LENGTH, STEP):
        yield whole[start : start + STEP]


def check(path: Path) -> None:
    np.testing.assert_array_equal(np.load(path), np.arange(LENGTH, dtype=np.float32))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_made_once_and_not_again(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.npy"
    fill_array(path, LENGTH, STEP, values)
    fill_array(path, LENGTH, STEP, lambda done: pytest.fail("it is there"))
    check(path)
    assert np.load(path, mmap_mode="r").dtype == np.float32


CHILD = """
import sys, time
from pathlib import Path
import numpy as np
from blt.data.cache_files import fill_array
def compute(done):
    for start in range(done, 1000, 64):
        yield np.arange(start, min(start + 64, 1000), dtype=np.float32)
        print(start, flush=True)
        time.sleep(60 if start == 256 else 0)
fill_array(Path(sys.argv[1]), 1000, 64, compute)
"""


def test_kill_9_loses_nothing_that_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.npy"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) == 4 * STEP:
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    assert not path.exists()
    asked = []
    fill_array(path, LENGTH, STEP, lambda done: asked.append(done) or values(done))
    assert asked[0] >= 5 * STEP
    assert asked[0] % STEP == 0
    check(path)


@pytest.mark.parametrize("torn", [1, 60, 130, 131, 128 + 4 * 100, 128 + 4 * LENGTH, 128 + 4 * LENGTH + 9])
def test_a_torn_file_is_cut_back_to_whole_steps(tmp_path: Path, torn: int) -> None:
    path = tmp_path / "a.npy"
    fill_array(path, LENGTH, STEP, values)
    whole = path.read_bytes() + b"too much"
    path.unlink()
    (tmp_path / ".a.npy.part").write_bytes(whole[:torn])
    fill_array(path, LENGTH, STEP, values)
    check(path)


def test_an_unfinished_file_of_another_length_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    (tmp_path / ".a.npy.part").write_bytes(b"\x93NUMPY something else" * 100)
    fill_array(path, LENGTH, STEP, values)
    check(path)


def test_a_full_disk_keeps_what_was_computed(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 4 * 700, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write to .*what was computed is kept"):
            fill_array(path, LENGTH, STEP, values)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not path.exists()
    asked = []
    fill_array(path, LENGTH, STEP, lambda done: asked.append(done) or values(done))
    assert asked == [10 * STEP]
    check(path)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        fill_array(tmp_path / "file" / "a.npy", LENGTH, STEP, values)


@pytest.mark.parametrize("kind", ["filled", "made"])
def test_of_two_only_one_computes(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    path = tmp_path / "a.npy"
    computing, go_on = threading.Event(), threading.Event()
    asked = []

    def slow(done: int) -> Iterator[np.ndarray]:
        asked.append(done)
        computing.set()
        assert go_on.wait(60)
        yield from values(done)

    def save(out: BinaryIO) -> None:
        np.save(out, np.concatenate(list(slow(0))))

    def work() -> None:
        create_file(path, save) if kind == "made" else fill_array(path, LENGTH, STEP, slow)

    threads = [threading.Thread(target=work) for _ in range(2)]
    with caplog.at_level(logging.INFO, "blt.data"):
        threads[0].start()
        assert computing.wait(60)
        threads[1].start()
        for _ in range(6000):
            if "waiting for another process" in caplog.text:
                break
            time.sleep(0.01)
        go_on.set()
        for thread in threads:
            thread.join(60)
    assert "waiting for another process" in caplog.text
    assert asked == [0]
    check(path)


def test_a_file_made_at_once_leaves_nothing_where_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"

    def save(out: BinaryIO) -> None:
        np.save(out, np.arange(LENGTH, dtype=np.float32))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 4 * 700, hard))
    try:
        with pytest.raises(InputError, match=r"cannot write to .*free some space") as caught:
            create_file(path, save)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "kept" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".a.npy.part").write_bytes(b"left by a kill" * 999)
    create_file(path, save)
    check(path)
    create_file(path, lambda out: pytest.fail("it is there"))
