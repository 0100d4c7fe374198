"""Hash tables as sparse parameters (`optimizer.tables: sparse`): a step costs what it touches, not what there is.

The tables are most of a BLT's parameters, and a batch touches few of their rows. The rows of the global batch are
gathered into a small table of static capacity, which is a leaf of the compiled step; its gradient updates these rows
and their moments. A row that is not touched waits. When it is next read, it is caught up with the steps it missed, in
closed form, since AdamW without a gradient is one: moments shrink by beta1^k and beta2^k, the weight decays, and each
missed step j moves it by

    lr_j * r^(j-s) * sqrt(1 - beta2^j) / (1 - beta1^j) * m / (sqrt(v) + eps'),      r = beta1 / sqrt(beta2),

s the step that last touched it. So this is dense AdamW up to rounding, but for one thing: eps is taken at s (eps' =
eps * sqrt(1 - beta2^s)), while dense AdamW lets sqrt(v) shrink towards a constant eps. The sums over j depend on s
alone and are kept for every s.

Every rank knows the global batch and keeps whole tables, outside FSDP; only the small gradient is summed over ranks.

Letters: R rows of all tables, D width, U touched rows, C capacity, B rows of a batch, N bytes, T tables.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.adamw import adamw

from blt.data.packing import Batch
from blt.model.hashing import HashEmbedding, Touched, hash_ids
from blt.train.config import OptimizerConfig
from blt.train.parallel import Ranks
from blt.train.parts import scale_of
from blt_runtime.errors import ConfigError

NAME = "hash_embedding.tables.weight"
SLACK = 1.25
"""Room above the first batch's touched rows, so that few later batches need another capacity and a compilation."""
NEGLIGIBLE = 1e-20
BLOCK = 1 << 16


def sparse_tables(model: nn.Module, config: OptimizerConfig) -> SparseTables | None:
    """Takes the tables of a BLT out of the dense optimizer's hands; None if that is not asked for, or they are frozen.

    Raises ConfigError if there are no hash tables, and for betas whose waiting rows would run away.
    """
    if config.tables == "dense":
        return None
    embedding = getattr(model, "hash_embedding", None)
    if not isinstance(embedding, HashEmbedding) or not isinstance(embedding.tables, nn.Embedding):
        raise ConfigError("optimizer.tables is sparse, but this model has no hash tables; leave it out")
    if config.betas[0] >= math.sqrt(config.betas[1]):
        raise ConfigError("optimizer.tables: sparse needs betas[0] below the square root of betas[1]")
    return SparseTables(embedding, config) if embedding.tables.weight.requires_grad else None


class CatchUp:
    """For every step s in 0 .. steps: what a row last touched at s has missed since.

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
        """One more step, t."""
        beta1, beta2 = self.betas
        t = self.steps + 1
        keep = 1.0 - lr * weight_decay
        ratio = beta1 / math.sqrt(beta2)
        near = t if ratio == 0 else min(t, math.ceil(math.log(NEGLIGIBLE) / math.log(ratio)))
        ages = np.arange(near, 0, -1)
        self.decay = np.append(self.decay * keep, 1.0)
        self.drift = np.append(self.drift * keep, 0.0)
        self.drift[t - near : t] += lr * ratio**ages * math.sqrt(1 - beta2**t) / (1 - beta1**t)


class SparseTables:
    """The tables of one model, their moments, and the rows that the current batch touches."""

    def __init__(self, embedding: HashEmbedding, config: OptimizerConfig) -> None:
        assert isinstance(embedding.tables, nn.Embedding)
        self.embedding, self.config = embedding, config
        self.scale = scale_of(NAME, config.lr_scale)
        self.weight_RD = embedding.tables.weight
        self.weight_RD.requires_grad_(False)
        self.exp_avg_RD, self.exp_avg_sq_RD = torch.zeros_like(self.weight_RD), torch.zeros_like(self.weight_RD)
        self.last_R = torch.zeros(len(self.weight_RD), dtype=torch.int32, device=self.weight_RD.device)
        self.missed = CatchUp(config.betas)
        self._capacity: dict[int, int] = {}

    # --- one step ------------------------------------------------------------------------------------------------

    def begin(self, batch: Batch) -> None:
        """Gathers the rows of a GLOBAL batch, as of now; nothing of the tables changes."""
        c = self.embedding.config
        ids_BN = torch.as_tensor(batch.ids, device=self.weight_RD.device)
        rows_BNT = hash_ids(ids_BN, c.sizes, c.functions, c.rows) + self.embedding.offset
        self.rows_U, self.places_BNT = torch.unique(rows_BNT, return_inverse=True)
        self.values = self._caught_up(self.rows_U)
        self.leaf_CD = self.weight_RD.new_zeros(self._room(batch.bucket, len(self.rows_U)), self.weight_RD.shape[1])
        self.leaf_CD[: len(self.rows_U)] = self.values[0]
        self.leaf_CD.requires_grad_(True)

    def place(self, first: int, stop: int) -> None:
        """The next computation is of these rows of the batch."""
        self.embedding.touched = Touched(self.leaf_CD, self.places_BNT[first:stop])

    def reduce(self, ranks: Ranks) -> Tensor:
        """The gradient [U, D] over all ranks' rows, after the backward pass."""
        if self.leaf_CD.grad is None:
            self.leaf_CD.grad = torch.zeros_like(self.leaf_CD)
        gradient_UD = self.leaf_CD.grad[: len(self.rows_U)]
        ranks.add_up(gradient_UD)
        return gradient_UD

    def step(self, gradient_UD: Tensor, lr: float) -> None:
        """AdamW on the touched rows; `lr` is the schedule's."""
        (beta1, beta2), rate = self.config.betas, lr * self.scale
        weight, exp_avg, exp_avg_sq = self.values
        steps = torch.tensor(float(self.missed.steps), device=weight.device)
        adamw(
            [weight], [gradient_UD], [exp_avg], [exp_avg_sq], [], [steps], fused=True, amsgrad=False, beta1=beta1,
            beta2=beta2, lr=rate, weight_decay=self.config.weight_decay, eps=self.config.eps, maximize=False,
        )  # fmt: skip
        self.missed.step(rate, self.config.weight_decay)
        self.weight_RD[self.rows_U], self.exp_avg_RD[self.rows_U] = weight, exp_avg
        self.exp_avg_sq_RD[self.rows_U] = exp_avg_sq
        self.last_R[self.rows_U] = self.missed.steps

    def settle(self) -> None:
        """Every row is caught up: what a dense table would hold."""
        for rows in torch.arange(len(self.weight_RD), device=self.weight_RD.device).split(BLOCK):
            self.weight_RD[rows], self.exp_avg_RD[rows], self.exp_avg_sq_RD[rows] = self._caught_up(rows)
            self.last_R[rows] = self.missed.steps
        self.embedding.touched = None

    def _caught_up(self, rows_U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of weight, first and second moment [U, D] of some rows after all steps so far."""
        beta1, beta2 = self.config.betas
        last_U = self.last_R[rows_U].long()
        weight, exp_avg, exp_avg_sq = (t[rows_U] for t in (self.weight_RD, self.exp_avg_RD, self.exp_avg_sq_RD))
        missed_U = (self.missed.steps - last_U).double()
        bias_U = torch.where(last_U > 0, (1 - beta2 ** last_U.double()).sqrt(), 1.0)
        drift_U, decay_U = self._of_steps(self.missed.drift, last_U), self._of_steps(self.missed.decay, last_U)
        move = exp_avg / (exp_avg_sq.sqrt() + _column(bias_U * self.config.eps))
        weight = weight * _column(decay_U) - move * _column(drift_U)
        return weight, exp_avg * _column(beta1**missed_U), exp_avg_sq * _column(beta2**missed_U)

    def _of_steps(self, values: NDArray[np.float64], last_U: Tensor) -> Tensor:
        return torch.as_tensor(values, device=last_U.device)[last_U]

    def _room(self, bucket: int, touched: int) -> int:
        """Static capacity for batches of one length: a power of two, doubled when a batch does not fit."""
        rows = len(self.weight_RD)
        if touched > self._capacity.get(bucket, 0):
            self._capacity[bucket] = min(rows, 1 << math.ceil(math.log2(touched * SLACK)))
        return self._capacity[bucket]

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The optimizer's state by name, besides the weight itself; filled in place when a run is resumed."""
        return {
            f"{NAME}.exp_avg": self.exp_avg_RD, f"{NAME}.exp_avg_sq": self.exp_avg_sq_RD, f"{NAME}.last": self.last_R,
            f"{NAME}.decay": torch.from_numpy(self.missed.decay), f"{NAME}.drift": torch.from_numpy(self.missed.drift),
        }  # fmt: skip

    def make_room(self, steps: int) -> None:
        """Before the state of a run with so many steps is loaded."""
        self.missed.decay, self.missed.drift = np.zeros((2, steps + 1))


def _column(values_U: Tensor) -> Tensor:
    return values_U.float()[:, None]
