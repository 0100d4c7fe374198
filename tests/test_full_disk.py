"""A full disk is one error that names the file, whatever was being written; nothing half-written is left.

The limit of the size of files (RLIMIT_FSIZE) raises the same errors at the same calls as a full disk.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from blt import files
from blt.checkpoint import huggingface, models
from blt.checkpoint.tensors import StoredTensor, write_safetensors
from blt.cli.failures import describe
from blt.data.prepare import prepare
from blt.train import checkpoints
from blt.train.metrics import MetricsFile
from blt_export import bundle
from blt_runtime.errors import BltError
from tests.tiny import tiny

LIMIT = 2048
WEIGHTS = StoredTensor(("w",), (torch.zeros(50, 50),))


@contextmanager
def full_disk() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_bundle(out: Path) -> None:
    with bundle.staged(out, force=False) as folder:
        bundle.write_hash_tables(WEIGHTS, folder / "t.npy", "float32")


def write_text(out: Path) -> None:
    (out.parent / "in.txt").write_bytes(b"words\n" * 300)
    prepare([out.parent / "in.txt"] * 3, out)


def write_lines(out: Path) -> None:
    for step in range(1000):
        MetricsFile(out).write({"step": step})


def write_array(out: Path) -> None:
    with files.atomic_file(out) as file:
        np.savez(file, ids=np.arange(5000))


WRITERS: dict[str, Callable[[Path], object]] = {
    "model.pt": lambda out: models.save(out, tiny("static")),
    "Hugging Face folder": lambda out: huggingface.write(tiny("plain").to_source(out), out),
    "safetensors": lambda out: write_safetensors(out, {"w": WEIGHTS}),
    "bundle": write_bundle,
    "data folder": write_text,
    "training checkpoint": lambda out: checkpoints.write(out, 3, {"w": torch.zeros(5000)}, {}, keep=1),
    "text": lambda out: files.replace_text(out, "x" * 5000),
    "array": write_array,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_names_the_file(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with full_disk(), pytest.raises((OSError, BltError)) as error:
        WRITERS[name](out)
    line, code = describe(error.value)
    assert code == 1
    assert "File too large" in line
    assert str(out) in line
    assert ".part" not in line
    assert name == "training checkpoint" or not out.exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_older_file_stays(tmp_path: Path) -> None:
    for name in ("text", "model.pt", "safetensors"):
        (tmp_path / "out").write_bytes(b"older")
        with full_disk(), pytest.raises((OSError, BltError)):
            WRITERS[name](tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == b"older"


def test_a_log_that_cannot_grow_names_its_file(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OSError) as error:
        write_lines(tmp_path / "metrics.jsonl")
    assert describe(error.value) == (f"File too large: {tmp_path / 'metrics.jsonl'}", 1)
