"""The formula for bytes between ranks. `test_parallel.py` and `test_sharded_tables.py` count what ranks really move."""

from __future__ import annotations

from pathlib import Path

import pytest

from blt.model import BLT
from blt.train import dry_run
from blt.train.config import BLTRun, load_config
from blt.train.parameters import TABLES
from blt.train.traffic import traffic

BATCH = ("batch.rows=16", "batch.micro_rows=2", "batch.byte_buckets=[64]")


def config_of(repo: Path, *settings: str) -> BLTRun:
    config = load_config(repo / "configs" / "tiny.yaml", [*BATCH, *settings])
    assert isinstance(config, BLTRun)
    return config


def test_one_process_receives_nothing(repo: Path) -> None:
    assert set(traffic(config_of(repo), 1).values()) == {0}
    assert "received_bytes" not in dry_run(config_of(repo))
    assert dry_run(config_of(repo), ranks=2)["received_bytes"] == traffic(config_of(repo), 2)


def test_each_micro_batch_moves_the_parameters(repo: Path) -> None:
    few, many = (traffic(config_of(repo, f"batch.micro_rows={rows}"), 2) for rows in (8, 2))
    assert many == {name: 4 * n_bytes for name, n_bytes in few.items()}
    assert few["gradients"] == 2 * sum(p.numel() for p in BLT(config_of(repo).model).parameters())
    assert traffic(config_of(repo), 4)["gradients"] == 2 * 3 * few["gradients"] // 2  # 2 of 3/4 where 1 of 1/2


def test_sparse_tables_move_rows_once_a_step(repo: Path) -> None:
    sparse, dense = (traffic(config_of(repo, f"optimizer.tables={form}"), 2) for form in ("sparse", "dense"))
    table = dict(BLT(config_of(repo).model).named_parameters())[TABLES]
    assert (
        dense["gathers"] - sparse["gathers"] == dense["gradients"] - sparse["gradients"] == 4 * 4 * table.numel() // 2
    )
    rows = min(len(table), 8 * 64 * config_of(repo).model.hash.n_tables)  # type: ignore[union-attr]
    assert sparse["tables"] == rows * (8 + 2 * 4 * table.shape[1]) // 2
    assert dense["tables"] == 0


def test_groups_gather_among_themselves_and_sum_over_all(repo: Path) -> None:
    two, four, groups = (traffic(config_of(repo, *more), n) for n, *more in ((2,), (4,), (4, "run.shard_ranks=2")))
    assert two["replicas"] == four["replicas"] == 0
    assert groups["gathers"] == two["gathers"] // 2  # half as many micro-batches
    assert groups["replicas"] == 2 * groups["gradients"] // 2  # of a half, twice


def test_bfloat16_halves_the_matrices_of_blocks_and_frozen_ones_have_no_gradients(repo: Path) -> None:
    half, full = (traffic(config_of(repo, f"run.dtype={dtype}"), 2) for dtype in ("bf16", "fp32"))
    assert half["gradients"] == full["gradients"]
    assert 0.3 < half["gathers"] / full["gathers"] < 1
    frozen = traffic(config_of(repo, "optimizer.freeze=[latent.*]"), 2)
    assert frozen["gradients"] < full["gradients"]
    assert frozen["gathers"] == full["gathers"]


@pytest.mark.parametrize("ranks", [3, 32])
def test_rows_that_do_not_divide_are_an_error(repo: Path, ranks: int) -> None:
    from blt_runtime.errors import ConfigError

    with pytest.raises(ConfigError, match="cannot be divided evenly"):
        traffic(config_of(repo), ranks)
