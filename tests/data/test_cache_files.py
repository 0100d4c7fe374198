"""A long array on disk, computed in parts: kill -9, a full disk, two processes at once, and files that do not fit."""

from __future__ import annotations

import errno
import logging
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from blt.data.cache_files import GrowingArray, Spans, create_file, draft_path
from blt_runtime.errors import InputError

LENGTH, STEP = 1000, 64


WHOLE = np.arange(LENGTH, dtype=np.float32)  # it begins with a zero
Parts = Iterator[tuple[int, np.ndarray]]


def compute(spans: Spans) -> Parts:
    for begin, end in spans:
        for at in range(begin, end, STEP):
            yield at, WHOLE[at : min(end, at + STEP)]


def fill(path: Path, begin: int = 0, end: int = LENGTH, how: Callable[[Spans], Parts] = compute) -> Spans:
    """Computes the missing steps of [begin, end); returns the spans that were missing."""
    array, requested = GrowingArray(path, LENGTH), []

    def missing() -> Spans:
        steps = [(at, min(end, at + STEP)) for at in range(begin, end, STEP)]
        requested.extend([step for step in steps if not array.has(*step)])
        return requested

    array.fill(missing, how)
    np.testing.assert_array_equal(array[slice(begin, end)], WHOLE[begin:end])
    return requested


def check(path: Path) -> None:
    np.testing.assert_array_equal(np.load(path), WHOLE)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_parts_in_any_order_make_the_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.npy"
    for begin, end in [(640, 1000), (0, 64), (64, 704)]:
        assert not path.exists()
        fill(path, begin, end)
    check(path)
    assert fill(path) == []
    assert np.load(path, mmap_mode="r").dtype == np.float32


def test_a_part_is_computed_once(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    fill(path, 128, 320)
    assert fill(path, 64, 448) == [(64, 128), (320, 384), (384, 448)]
    assert GrowingArray(path, LENGTH).has(64, 448)
    assert not GrowingArray(path, LENGTH).has(64, 449)


def test_missing_parts_use_no_disk(tmp_path: Path) -> None:
    length = 64 << 20
    array = GrowingArray(tmp_path / "a.npy", length)
    array.fill(lambda: [(1 << 20, (1 << 20) + 9)], lambda spans: iter([(1 << 20, WHOLE[:9])]))
    assert draft_path(array.path).stat().st_blocks * 512 < 1 << 20
    np.testing.assert_array_equal(array[1 << 20 : (1 << 20) + 9], WHOLE[:9])


CHILD = """
import sys, time
from pathlib import Path
import numpy as np
from blt.data.cache_files import GrowingArray
def compute(spans):
    for start in range(0, 1000, 64):
        yield start, np.arange(start, min(start + 64, 1000), dtype=np.float32)
        print(start, flush=True)
        time.sleep(60 if start == 256 else 0)
GrowingArray(Path(sys.argv[1]), 1000).fill(lambda: [(0, 1000)], compute)
"""


def test_kill_9_loses_nothing_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.npy"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) == 4 * STEP:
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    assert not path.exists()
    assert fill(path)[0] == (5 * STEP, 6 * STEP)
    check(path)


@pytest.mark.parametrize("torn", [1, 60, 130, 131, 128 + 4 * 100, 128 + 4 * LENGTH, 128 + 4 * LENGTH + 9])
def test_the_unfinished_file_of_an_older_version_is_continued(tmp_path: Path, torn: int) -> None:
    """It was appended to, so its size was the number of computed values; its last value may be torn."""
    path = tmp_path / "a.npy"
    np.save(path, WHOLE)
    whole = path.read_bytes() + b"too much"
    path.unlink()
    (tmp_path / ".a.npy.part").write_bytes(whole[:torn])
    fill(path)
    check(path)


def test_an_unfinished_file_of_another_length_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    (tmp_path / ".a.npy.part").write_bytes(b"\x93NUMPY something else" * 100)
    fill(path)
    check(path)


def test_a_full_disk_keeps_computed_parts(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"

    def full(spans: Spans) -> Parts:
        yield from list(compute(spans))[:10]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"cannot write to .*No space left.*what was computed is kept"):
        fill(path, how=full)
    assert not path.exists()
    assert fill(path)[0] == (10 * STEP, 11 * STEP)
    check(path)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        fill(tmp_path / "file" / "a.npy")


@pytest.mark.parametrize("kind", ["filled", "made"])
def test_of_two_processes_only_one_computes(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    path = tmp_path / "a.npy"
    computing, go_on = threading.Event(), threading.Event()
    requested: list[Spans] = []

    def slow(spans: Spans) -> Parts:
        requested.append(spans)
        computing.set()
        assert go_on.wait(60)
        yield from compute(spans)

    def save(out: BinaryIO) -> None:
        np.save(out, np.concatenate([values for _, values in slow([(0, LENGTH)])]))

    def work() -> None:
        if kind == "made":
            create_file(path, save)
        else:
            fill(path, how=slow)

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
    assert len(requested) == 1
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
