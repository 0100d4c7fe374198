"""Run by torchrun in `test_sharded_tables.py`: sharded tables against whole ones on every rank.

    torchrun ... -m tests.train.sharded_program ONE_RANKS_CHECKPOINTS THIS_ONES_CHECKPOINTS

Gradients are small integers, so that their sums are exact in any order. AdamW's kernel rounds the last numbers of a
tensor in another way than those before, so rows are not equal to the bit.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from blt.data.batches import Batch
from blt.model.config import HashConfig
from blt.model.hashing import HashEmbedding, hash_ids
from blt.train import checkpoints, parallel, tables
from blt.train.config import OptimizerConfig
from blt.train.optim import gradient_norm
from blt.train.parallel import Ranks
from blt.train.parameters import TABLES, settings_of
from blt.train.tables import ShardedTables, SparseTables

HASH, WIDTH = HashConfig(sizes=(2, 3), rows=101), 4
STEPS, ROWS, LENGTH = 7, 6, 10
assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
FEW = 30
"""Of the rows of each table, in every other batch: then the last of three ranks owns no touched row."""
CONFIG = OptimizerConfig(tables="sparse")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hash_embedding = HashEmbedding(HASH, WIDTH)
        self.other = nn.Linear(2, 2)


def initial_model() -> Model:
    torch.manual_seed(0)
    return Model()


def batches() -> Iterator[tuple[Batch, Tensor]]:
    """Batches of random ids, and the gradient of each embedding."""
    random = np.random.default_rng(0)
    for _ in range(STEPS):
        ids = random.integers(4, 260, (ROWS, LENGTH))
        batch = Batch(ids, ids, ids > 0, None, np.zeros(ROWS, np.int64), block=0, micro_rows=1)
        yield batch, torch.from_numpy(random.integers(1, 9, (ROWS, LENGTH, WIDTH))).float()


def step(kept: SparseTables, batch: Batch, gradient_BND: Tensor) -> tuple[Tensor, Tensor]:
    """A step of the tables alone; returns this rank's embeddings and the gradient norm."""
    ids_BN = kept.ranks.share(torch.from_numpy(batch.ids), 1)
    sharded = isinstance(kept, ShardedTables)  # it reads the share of its rank, the whole tables read all
    kept.gather(replace(batch, ids=ids_BN.numpy()) if sharded else batch)
    embeddings = []
    for row, gradient_ND in enumerate(kept.ranks.share(gradient_BND, 1)):
        kept.select_rows(row, row + 1, LENGTH)
        embeddings.append(kept.embedding(ids_BN[row : row + 1]))
        embeddings[-1].backward(gradient_ND[None])
    gradient = kept.reduce()
    norm = gradient_norm([], [gradient], kept.owners)
    kept.step(gradient, lr=0.01)
    return torch.cat(embeddings).detach(), norm


def few_rows(number: int) -> None:
    """Even batches read few rows of each table."""
    rows = FEW if number % 2 == 0 else HASH.rows
    vars(tables)["hash_ids"] = lambda ids, sizes, functions, _: hash_ids(ids, sizes, functions, rows)


def asked(batch: Batch, rows: int) -> list[np.ndarray]:
    """The different table rows that each of three ranks reads."""
    hashed = hash_ids(torch.from_numpy(batch.ids), HASH.sizes, HASH.functions, rows).numpy()
    hashed += HASH.rows * np.arange(HASH.n_tables)
    return [np.unique(hashed[rank::3]) for rank in range(3)]


@dataclass
class Moved:
    """Bytes that this rank sends to others by all-to-all."""

    rank: int
    bytes: int = 0
    original: Any = field(default_factory=lambda: dist.all_to_all_single)

    def __call__(self, output: Tensor, input: Tensor, received: list[int], sent: list[int]) -> None:
        row = input.element_size() * input[0].numel() if len(input) else 0
        self.bytes += row * (sum(sent) - sent[self.rank])
        self.original(output, input, received, sent)


def check_bytes(moved: Moved, batch: Batch, number: int) -> None:
    """The formula of docs/training.md: counts; ids and gradients that this rank sends, rows that others fetch of it."""
    each, rank = parallel.rows_per_rank(HASH.n_tables * HASH.rows, 3), moved.rank
    wanted = asked(batch, FEW if number % 2 == 0 else HASH.rows)
    by_me = int((wanted[rank] // each != rank).sum())
    of_me = sum(int((wanted[other] // each == rank).sum()) for other in range(3) if other != rank)
    assert moved.bytes == 8 * 2 + by_me * (8 + 4 * WIDTH) + of_me * 4 * WIDTH
    assert number % 2 or rank != 2 or of_me == 0
    moved.bytes = 0


def check_rows(sharded: SparseTables, reference: SparseTables, own: slice) -> None:
    """Weights, moments and last steps of this rank's rows."""
    names = ("weight_RD", "exp_avg_RD", "exp_avg_sq_RD", "last_R")
    assert_close([getattr(sharded, name) for name in names], [getattr(reference, name)[own] for name in names])


def state_of(model: nn.Module, kept: SparseTables) -> dict[str, Tensor]:
    return {"weight": model.get_parameter("hash_embedding.tables.weight").detach(), **kept.tensors()}


def loaded(model: nn.Module, kept: SparseTables, folder: Path, ranks: Ranks) -> None:
    """Fills the tables from a checkpoint of any number of ranks."""
    checkpoint = checkpoints.read_newest(folder)
    assert checkpoint is not None
    kept.resize_history(checkpoint.step)
    checkpoint.load(state_of(model, kept), ranks)


def main(one: Path, three: Path) -> None:
    with parallel.processes("cpu") as (ranks, device):
        whole = initial_model()
        reference = SparseTables(whole.hash_embedding, settings_of(TABLES, CONFIG), ranks)
        model = copy.deepcopy(initial_model())
        weight = model.get_parameter("hash_embedding.tables.weight")
        parallel.shard(model, ranks, torch.device(device), by_row=[weight])
        sharded = tables.sparse_tables(model, CONFIG, ranks)
        assert isinstance(sharded, ShardedTables)
        own = slice(68 * ranks.rank, min(202, 68 * (ranks.rank + 1)))
        assert sharded.weight_RD.untyped_storage().nbytes() == 4 * WIDTH * (66 if ranks.rank == 2 else 68)
        moved = Moved(ranks.rank)
        dist.all_to_all_single = moved  # type: ignore[assignment]
        for number, (batch, gradient) in enumerate(batches()):
            few_rows(number)
            found, expected = (step(kept, batch, gradient) for kept in (sharded, reference))
            check_bytes(moved, batch, number)
            assert_close(found, expected)
            assert len(sharded.leaf_CD) < len(reference.leaf_CD)
        check_rows(sharded, reference, own)
        loaded(model, sharded, one, ranks)
        check_rows(sharded, reference, own)
        checkpoints.write(three, STEPS, state_of(model, sharded), {}, keep=1, ranks=ranks)
        for kept in (sharded, reference):
            kept.catch_up_all()
        check_rows(sharded, reference, own)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
