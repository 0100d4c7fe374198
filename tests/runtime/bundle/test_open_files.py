"""Files that change while a bundle is open: one error instead of other output or the end of the process."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blt_runtime import Bundle, Model, Scheduler
from blt_runtime.backends.null import NullBackend
from blt_runtime.bundle.open_files import OpenFiles
from blt_runtime.errors import BundleError
from blt_runtime.hashing import HashEmbedding
from blt_runtime.sampling import Sampler
from blt_runtime.stream import CHECK_EVERY
from tests.runtime.bundles import write_bundle
from tests.runtime.row_backend import NullRowBackend

TABLES = "hash_tables.npy"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "b")
    return tmp_path / "b"


def cut(path: Path) -> None:
    os.truncate(path, 200)


def overwrite(path: Path) -> None:
    """Another byte in place; the time is set too, since the clock of a file system may be coarse."""
    info = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x07")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))


CHANGES = {"cut": (cut, "has 200 bytes instead of"), "overwritten": (overwrite, "was written to")}


@pytest.mark.parametrize("change", CHANGES)
def test_every_method_of_a_stream_detects_a_changed_file(folder: Path, change: str) -> None:
    model = Model.open(folder, backend="null")
    stream = model.stream()
    stream.append(b"some text")
    snapshot, pieces = stream.snapshot(), stream.generate(5, temperature=0)
    do, message = CHANGES[change]
    do(folder / TABLES)
    calls: dict[str, Callable[[], object]] = {
        "a new stream": model.stream,
        "append": lambda: stream.append(b"more"),
        "rewind": lambda: stream.rewind(2),
        "reset": stream.reset,
        "restore": lambda: stream.restore(snapshot),
        "score": lambda: stream.score_ids([1, 7]),
        "generate": lambda: next(pieces),
    }
    for call in calls.values():
        with pytest.raises(BundleError, match=f"{TABLES} in .* {message}.* open it again"):
            call()
    assert stream.position == 10


@pytest.mark.parametrize("change", CHANGES)
def test_a_text_that_is_being_generated_ends_with_an_error(folder: Path, change: str) -> None:
    pieces = Model.open(folder, backend="null").stream().generate(400, temperature=0, stop_at_eos=False)
    next(pieces)
    CHANGES[change][0](folder / TABLES)
    with pytest.raises(BundleError):
        list(itertools.islice(pieces, CHECK_EVERY))


@pytest.mark.parametrize("change", CHANGES)
def test_a_scheduler_refuses_requests_after_a_change(folder: Path, change: str) -> None:
    bundle = Bundle.open(folder)
    spec = bundle.manifest.spec
    model = Model(spec, NullRowBackend(spec), bundle.hash_tables(), files=OpenFiles(bundle))
    with Scheduler(model, streams=2) as scheduler:
        assert len(scheduler.submit("text", 5, stop_at_eos=False).result()) <= 5
        CHANGES[change][0](folder / TABLES)
        with pytest.raises(BundleError, match="open it again"):
            scheduler.submit("text", 5)


class WaitingSampler(Sampler):
    """Chooses one id, and the others once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        super().__init__(0.0)
        self.event, self.calls = event, 0

    def __call__(self, logits: np.ndarray) -> int:
        self.calls += 1
        return 70 if self.calls == 1 or self.event.wait(30) else 71


def test_a_request_that_runs_ends_with_an_error_after_a_change(folder: Path) -> None:
    bundle = Bundle.open(folder)
    spec = bundle.manifest.spec
    model, changed = Model(spec, NullRowBackend(spec), bundle.hash_tables(), files=OpenFiles(bundle)), threading.Event()
    with Scheduler(model, streams=2) as scheduler:
        request = scheduler.submit_ids(np.array([1, 70]), 400, sampler=WaitingSampler(changed), stop_at_eos=False)
        pieces = iter(request)
        next(pieces)
        overwrite(folder / TABLES)
        changed.set()
        with pytest.raises(BundleError, match="open it again"):
            list(pieces)


def test_a_bundle_that_is_replaced_by_renaming_stays_open(folder: Path) -> None:
    model = Model.open(folder, backend="null")
    before = model.score([1, 70, 71]).logits
    folder.rename(folder.with_name("old"))
    write_bundle(folder)
    shutil.rmtree(folder.with_name("old"))
    np.testing.assert_array_equal(model.score([1, 70, 71]).logits, before)


def test_a_bundle_that_is_replaced_while_it_is_opened_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*_: object, **__: object) -> NullBackend:
        (folder / TABLES).rename(folder / "old")
        shutil.copy2(folder / "old", folder / TABLES)
        return NullBackend(Bundle.open(folder).manifest.spec)

    monkeypatch.setattr("blt_runtime.model._backend", replace)
    with pytest.raises(BundleError, match="was replaced while"):
        Model.open(folder, backend="null")


def test_a_table_that_is_cut_raises_at_the_next_lookup(folder: Path) -> None:
    """Also between two checks of the bundle: reading a page that is gone would end the process."""
    tables = Bundle.open(folder).hash_tables()["encoder"]
    embedding = HashEmbedding(tables, (3, 4), 1, 50)
    out = np.zeros(4, np.float32)
    window = np.array([5, 6, 7, 8])
    embedding.one(window, out)
    cut(folder / TABLES)
    with pytest.raises(BundleError, match="was cut"):
        embedding.one(window, out)
    with pytest.raises(BundleError, match="was cut"):
        embedding.many(window, out[None])


SURVIVES = """
import json, os, sys
import numpy as np
from blt_runtime import Model
from blt_runtime.errors import BundleError
model = Model.open(sys.argv[1], backend="null", verify="sizes")
stream = model.stream()
os.truncate(sys.argv[1] + "/hash_tables.npy", 0)
try:
    stream.append(bytes(range(256)))
except BundleError as error:
    print(json.dumps(str(error)))
"""


def test_a_cut_file_does_not_end_the_process(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b")
    code = f"import sys; sys.path[:0] = {sys.path!r}\n{SURVIVES}"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "b"], capture_output=True, text=True, check=True)
    assert "has 0 bytes instead of" in json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_files_are_closed_with_the_model(folder: Path) -> None:
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    model = Model.open(folder, backend="null")
    assert len(list(Path("/proc/self/fd").iterdir())) > before
    del model
    assert len(list(Path("/proc/self/fd").iterdir())) == before
