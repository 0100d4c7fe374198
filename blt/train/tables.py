"""Hash tables as sparse parameters (`optimizer.tables: sparse`): a step costs as much as the rows that it touches.

The tables are most of a BLT's parameters, and a batch touches few of their rows. The rows of the global batch are
gathered into a small table of static capacity, which is a leaf of the compiled step; its gradient updates these rows
and their moments. A row that is not touched is updated late: when it is next read, it catches up with the steps it
missed. That is a closed form, because AdamW without a gradient has one: moments shrink by beta1^k and beta2^k, the
weight decays, and each missed step j moves it by

    lr_j * r^(j-s) * sqrt(1 - beta2^j) / (1 - beta1^j) * m / (sqrt(v) + eps'),      r = beta1 / sqrt(beta2),

where s is the step that last touched the row. The result is dense AdamW up to rounding, with one exception: eps is
that of step s (eps' = eps * sqrt(1 - beta2^s)), while dense AdamW lets sqrt(v) shrink towards a constant eps. The sums
over j depend only on s and are stored for every s.

Several ranks divide the rows among them (`ShardedTables`), outside FSDP. A rank owns the weights, moments and last
steps of its rows, and updates them. It fetches the rows that its part of the batch reads from their owners, and sends
their gradients back.

Letters: R rows of all tables (of a rank, if they are divided), D width, U touched rows, C capacity, B rows of a batch,
N bytes, T tables. If rows are divided: A rows that this rank asks for, X rows that all ranks ask it for, W ranks.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from blt.data.batches import Batch
from blt.model.hashing import HashEmbedding, Touched, hash_ids
from blt.model.shards import local
from blt.train.config import OptimizerConfig
from blt.train.parallel import SINGLE, Ranks, part_of, rows_per_rank
from blt.train.parameters import TABLES, Settings, settings_of
from blt_runtime.errors import ConfigError

SLACK = 1.25
"""Capacity over the rows that the first batch touches, so that few later batches need more and a compilation."""
NEGLIGIBLE = 1e-20
"""Missed steps whose factor r^(j-s) is smaller are left out of the sums."""
BLOCK = 1 << 16
"""Rows caught up at a time."""


def sparse_tables(model: nn.Module, config: OptimizerConfig, ranks: Ranks = SINGLE) -> SparseTables | None:
    """Takes the tables of a BLT away from the dense optimizer; None if `optimizer.tables` is dense, or they are frozen.

    ranks: those that `blt.train.parallel.shard` divided the rows of the tables among.

    Raises ConfigError if there are no hash tables, and for betas with which rows that wait would diverge (r >= 1).
    Betas, eps and weight decay are those of `blt.train.parameters.settings_of`, as for dense tables.
    """
    if config.tables == "dense":
        return None
    embedding = getattr(model, "hash_embedding", None)
    if not isinstance(embedding, HashEmbedding) or not isinstance(embedding.tables, nn.Embedding):
        raise ConfigError("optimizer.tables is sparse, but this model has no hash tables; leave it out")
    settings = settings_of(TABLES, config)
    if settings.betas[0] >= math.sqrt(settings.betas[1]):
        raise ConfigError(
            "optimizer.tables: sparse needs betas[0] of the tables below the square root of their betas[1]; a group of "
            "optimizer.groups may give them others"
        )
    if not embedding.tables.weight.requires_grad:
        return None
    return SparseTables(embedding, settings) if ranks.single else ShardedTables(embedding, settings, ranks)


class CatchUp:
    """For every step s in 0 .. steps: the updates that a row last touched at s has missed since.

    `decay[s]` is the product of 1 - lr * weight_decay, `drift[s]` the sum above with later decay applied. float64.
    """

    def __init__(self, betas: tuple[float, float]) -> None:
        self.betas = betas
        self.decay = np.ones(1)
        self.drift = np.zeros(1)

    @property
    def steps(self) -> int:
        return len(self.decay) - 1

    def step(self, lr: float, weight_decay: float) -> None:
        """Adds the update of one more step, t."""
        beta1, beta2 = self.betas
        t = self.steps + 1
        keep = 1.0 - lr * weight_decay
        ratio = beta1 / math.sqrt(beta2)
        near = t if ratio == 0 else min(t, math.ceil(math.log(NEGLIGIBLE) / math.log(ratio)))
        ages = np.arange(near, 0, -1)
        self.decay = np.append(self.decay * keep, 1.0)
        self.drift = np.append(self.drift * keep, 0.0)
        self.drift[t - near : t] += lr * ratio**ages * math.sqrt(1 - beta2**t) / (1 - beta1**t)


def capacity_for(touched: int, rows: int) -> int:
    """The rows of the small table for a batch that touches so many of the `rows` rows: a power of two, or all."""
    return min(rows, 1 << math.ceil(math.log2(touched * SLACK)))


class SparseTables:
    """The tables of one model, their moments, and the rows that the current batch touches.

    With several `ranks`, each has whole tables and reads the global batch: the reference of `ShardedTables`, for tests.
    """

    owners = SINGLE
    """The ranks that the rows are divided among."""

    def __init__(self, embedding: HashEmbedding, settings: Settings, ranks: Ranks = SINGLE) -> None:
        assert isinstance(embedding.tables, nn.Embedding)
        weight = embedding.tables.weight
        weight.requires_grad_(False)
        self.embedding, self.settings, self.ranks = embedding, settings, ranks
        self.n_rows = len(weight)
        self.weight_RD: Tensor = local(weight)
        self.missed = CatchUp(settings.betas)
        self._capacity = 0

    @cached_property
    def exp_avg_RD(self) -> Tensor:
        """First moments, made at their first use: whole ones never exist if the tables are divided before."""
        return torch.zeros_like(self.weight_RD)

    @cached_property
    def exp_avg_sq_RD(self) -> Tensor:
        """Second moments."""
        return torch.zeros_like(self.weight_RD)

    @cached_property
    def last_R(self) -> Tensor:
        """The step that last touched each row, 0 for none."""
        return torch.zeros(len(self.weight_RD), dtype=torch.int32, device=self.weight_RD.device)

    # --- one step ------------------------------------------------------------------------------------------------

    def gather(self, batch: Batch) -> None:
        """Gathers the caught-up rows of a GLOBAL batch; the tables do not change."""
        self.rows_U, places_BNT = self._touched(torch.as_tensor(batch.ids))
        self.places_BNT = self.ranks.share(places_BNT, batch.micro_rows)
        self.values = self._caught_up(self.rows_U)
        self._fill(self.values[0])

    def select_rows(self, first: int, stop: int, length: int) -> None:
        """The next forward pass is over the first `length` positions of the rows [first, stop) of this rank's share."""
        self.embedding.touched = Touched(self.leaf_CD, self.places_BNT[first:stop, :length].contiguous())

    def reduce(self) -> Tensor:
        """The gradient [U, D] over all ranks' rows, after the backward pass."""
        gradient_UD = self._gradient(len(self.rows_U))
        self.ranks.all_reduce(gradient_UD)
        return gradient_UD

    def step(self, gradient_UD: Tensor, lr: float) -> None:
        """Updates the touched rows by AdamW; `lr` is the schedule's."""
        (beta1, beta2), rate = self.settings.betas, lr * self.settings.scale
        weight, exp_avg, exp_avg_sq = self.values
        steps = torch.tensor(float(self.missed.steps), device=weight.device)
        adamw(
            [weight], [gradient_UD], [exp_avg], [exp_avg_sq], [], [steps], fused=True, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=rate, weight_decay=self.settings.weight_decay, eps=self.settings.eps, maximize=False,
        )  # fmt: skip
        self.missed.step(rate, self.settings.weight_decay)
        self.weight_RD[self.rows_U], self.exp_avg_RD[self.rows_U] = weight, exp_avg
        self.exp_avg_sq_RD[self.rows_U] = exp_avg_sq
        self.last_R[self.rows_U] = self.missed.steps

    def catch_up_all(self) -> None:
        """Catches up every row, so that the table holds what a dense one would."""
        for rows in torch.arange(len(self.weight_RD), device=self.weight_RD.device).split(BLOCK):
            self.weight_RD[rows], self.exp_avg_RD[rows], self.exp_avg_sq_RD[rows] = self._caught_up(rows)
            self.last_R[rows] = self.missed.steps
        self.forget_batch()

    def forget_batch(self) -> None:
        """Later forward passes read the tables themselves, where rows have not caught up since they were last read."""
        self.embedding.touched = None

    def _touched(self, ids_BN: Tensor) -> tuple[Tensor, Tensor]:
        """The table rows that these ids read, ascending, and for every byte and table the index of its row there."""
        c = self.embedding.config
        rows_BNT = (
            hash_ids(ids_BN.to(self.weight_RD.device).long(), c.sizes, c.functions, c.rows) + self.embedding.offset
        )
        rows, places_BNT = torch.unique(rows_BNT, return_inverse=True)
        return rows, places_BNT

    def _fill(self, rows_AD: Tensor) -> None:
        """Makes the leaf of the next passes. Its capacity is static: doubled when a batch does not fit."""
        if len(rows_AD) > self._capacity:
            self._capacity = capacity_for(len(rows_AD), self.n_rows)
        self.leaf_CD = rows_AD.new_zeros(self._capacity, rows_AD.shape[1])
        self.leaf_CD[: len(rows_AD)] = rows_AD
        self.leaf_CD.requires_grad_(True)

    def _gradient(self, rows: int) -> Tensor:
        """The gradient of the leaf's first rows; zeros if no backward pass reached it."""
        if self.leaf_CD.grad is None:
            self.leaf_CD.grad = torch.zeros_like(self.leaf_CD)
        return self.leaf_CD.grad[:rows]

    def _caught_up(self, rows_U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of weight, first and second moment [U, D] of some rows after all steps so far."""
        beta1, beta2 = self.settings.betas
        last_U = self.last_R[rows_U].long()
        weight, exp_avg, exp_avg_sq = (t[rows_U] for t in (self.weight_RD, self.exp_avg_RD, self.exp_avg_sq_RD))
        missed_U = (self.missed.steps - last_U).double()
        bias_U = torch.where(last_U > 0, (1 - beta2 ** last_U.double()).sqrt(), 1.0)
        drift_U, decay_U = (
            torch.as_tensor(sums, device=last_U.device)[last_U] for sums in (self.missed.drift, self.missed.decay)
        )
        move = exp_avg / (exp_avg_sq.sqrt() + _column(bias_U * self.settings.eps))
        weight = weight * _column(decay_U) - move * _column(drift_U)
        return weight, exp_avg * _column(beta1**missed_U), exp_avg_sq * _column(beta2**missed_U)

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by name, without the weight; a resumed run fills these tensors in place."""
        rows = {"exp_avg": self.exp_avg_RD, "exp_avg_sq": self.exp_avg_sq_RD, "last": self.last_R}
        found = {key: self._of_all_ranks(tensor) for key, tensor in rows.items()}
        found |= {"decay": torch.from_numpy(self.missed.decay), "drift": torch.from_numpy(self.missed.drift)}
        return {f"{TABLES}.{key}": tensor for key, tensor in found.items()}

    def _of_all_ranks(self, tensor_R: Tensor) -> Tensor:
        return tensor_R

    def resize_history(self, steps: int) -> None:
        """Makes room for the sums of a run with `steps` steps, before its state is loaded."""
        self.missed.decay, self.missed.drift = np.zeros((2, steps + 1))


class ShardedTables(SparseTables):
    """Tables whose rows are divided among ranks (`blt.train.parallel.shard`), in equal parts of consecutive rows.

    `rows_U` are rows that this rank owns, numbered from its first one, that any rank's part of the batch touches.
    `values` and the gradient are theirs. Every rank calls each method.
    """

    def __init__(self, embedding: HashEmbedding, settings: Settings, ranks: Ranks) -> None:
        super().__init__(embedding, settings, ranks)
        assert isinstance(embedding.tables, nn.Embedding)
        weight_RD = embedding.tables.weight
        assert isinstance(weight_RD, DTensor)
        self.owners, self.mesh = ranks, weight_RD.device_mesh
        self.each = rows_per_rank(self.n_rows, ranks.world)
        self.first = ranks.rank * self.each

    def gather(self, batch: Batch) -> None:
        """Fetches the caught-up rows that this rank's share of a batch reads; the tables do not change."""
        ranks = self.ranks
        asked_A, self.places_BNT = self._touched(torch.as_tensor(batch.ids))
        firsts_W = self.each * torch.arange(ranks.world + 1, device=asked_A.device)
        counts_W = torch.searchsorted(asked_A, firsts_W).diff()
        one_each = [1] * ranks.world
        asked_by_W = ranks.exchange(counts_W, one_each, one_each)
        self.sent, self.received = torch.stack((counts_W, asked_by_W)).tolist()
        rows_X = ranks.exchange(asked_A, self.sent, self.received) - self.first
        self.rows_U, self.places_X = torch.unique(rows_X, return_inverse=True)
        self.values = self._caught_up(self.rows_U)
        self._fill(ranks.exchange(self.values[0][self.places_X], self.received, self.sent))

    def reduce(self) -> Tensor:
        """The gradient [U, D] of this rank's rows, summed in the order of ranks, after the backward pass."""
        arrived_XD = self.ranks.exchange(self._gradient(sum(self.sent)), self.sent, self.received)
        gradient_UD = torch.zeros_like(self.values[0])
        for places, part_D in zip(self.places_X.split(self.received), arrived_XD.split(self.received), strict=True):
            gradient_UD[places] += part_D  # a rank asks for a row once
        return gradient_UD

    def _of_all_ranks(self, tensor_R: Tensor) -> Tensor:
        return part_of(tensor_R, self.n_rows, self.mesh)


def _column(values_U: Tensor) -> Tensor:
    return values_U.float()[:, None]
