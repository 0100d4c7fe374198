"""The bytes that ranks send each other in a step, by formula.

A collective over W ranks costs each of them (W - 1) / W of the whole tensor, received and sent, as rings do it; summing
a tensor that all of them keep costs twice that. Every micro-batch gathers all parameters for the forward pass, and the
matrices of blocks once more for the backward pass. It reduces float32 gradients. `tests/train/test_parallel.py` counts
what ranks move.
"""

from __future__ import annotations

from itertools import chain

import torch

from blt.model.layers import Block
from blt.train.config import RunConfig
from blt.train.models import make_model
from blt.train.parallel import matrices, micro_rows, ranks_of_a_group
from blt.train.parameters import sparse_table

FLOAT, ID = 4, 8


def traffic(config: RunConfig, ranks: int) -> dict[str, int]:
    """Bytes that one of `ranks` processes receives in a step; it sends as many. All 0 for one process.

    gathers: whole parameters of FSDP.  gradients: reduced and scattered.  replicas: the sums of gradients over groups
    of `run.shard_ranks`.  tables: rows of sparse hash tables, their ids and gradients, if every position of the rank's
    rows reads other rows (as many as there are, at most).

    Raises ConfigError if the rows cannot be divided among the ranks, or the ranks into groups.
    """
    group = ranks_of_a_group(config.run.shard_ranks, ranks)
    micro_batches = config.batch.rows // (ranks * micro_rows(config.batch, ranks))
    with torch.device("meta"):
        model = make_model(config)
    table = sparse_table(model, config.optimizer)
    shared = [parameter for parameter in model.parameters() if parameter is not table]
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    of_blocks = sum(parameter.numel() for parameter in chain.from_iterable(map(matrices, blocks)))
    size = 2 if config.run.dtype == "bf16" else FLOAT
    others = sum(parameter.numel() for parameter in shared) - of_blocks
    trained = sum(parameter.numel() for parameter in shared if parameter.requires_grad)
    tables = 0
    if table is not None:
        assert config.model.hash is not None
        positions = config.batch.rows // ranks * config.batch.byte_buckets[-1]
        read = min(len(table), positions * config.model.hash.n_tables)
        tables = read * (ID + 2 * FLOAT * table.shape[1])
    gathered, reduced = FLOAT * others + 2 * size * of_blocks, FLOAT * trained
    return {
        "gathers": _received(micro_batches * gathered, group),
        "gradients": _received(micro_batches * reduced, group),
        "replicas": 2 * _received(micro_batches * reduced // group, ranks // group),
        "tables": _received(tables, ranks),
    }


def _received(n_bytes: int, ranks: int) -> int:
    return n_bytes * (ranks - 1) // ranks
