"""Tables whose rows are divided among ranks are whole ones within rounding, and move the bytes of the formula."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blt.model.hashing import hash_ids
from blt.train import checkpoints, tables
from blt.train.parallel import SINGLE
from tests.train import sharded_program as program


@pytest.mark.slow
def test_three_ranks_divide_the_rows_unevenly(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings, norms, rows, moments and bytes moved of each step, an owner of no touched row; a checkpoint 1 -> 3
    -> 1."""
    monkeypatch.setattr("blt.train.tables.hash_ids", hash_ids)  # the program replaces it
    model = program.initial_model()
    whole = tables.sparse_tables(model, program.CONFIG)
    assert whole is not None
    for number, (batch, gradient) in enumerate(program.batches()):
        program.few_rows(number)
        program.step(whole, batch, gradient)
    state = program.state_of(model, whole)
    checkpoints.write(tmp_path / "one", program.STEPS, state, {}, keep=1)
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "3",
        "-m",
        "tests.train.sharded_program",
    ]
    paths = os.pathsep.join(str(repo / part) for part in (".", "export", "runtime"))
    subprocess.run(
        [sys.executable, *launch, str(tmp_path / "one"), str(tmp_path / "three")],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, check=True, timeout=300, cwd=repo,
    )  # fmt: skip
    again = program.initial_model()
    found = tables.sparse_tables(again, program.CONFIG)
    assert found is not None
    program.loaded(again, found, tmp_path / "three", SINGLE)
    assert all(torch.equal(tensor, state[name]) for name, tensor in program.state_of(again, found).items())
