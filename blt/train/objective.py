"""The objective of a step: the summed cross-entropy of a batch, compiled once per batch shape.

Letters: B rows, N bytes, P patches, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blt.data.batches import Batch
from blt.model import BLT, EntropyModel
from blt.train.config import MAX_BUCKETS
from blt_runtime.errors import BltError

MAX_COMPILATIONS = 6 * MAX_BUCKETS
"""Of one function: every row length, for three stages, with and without gradients (torch allows 8 by default)."""


class Diverged(BltError):
    """The loss or a gradient is no longer finite: training cannot go on from here."""


class Objective:
    """Σ −ln p(target) over the unmasked positions of a batch.

    The same compiled code serves training and validation. A separate graph for validation (without gradients) would
    double the compilations and save only memory.
    """

    def __init__(
        self,
        model: EntropyModel | BLT,
        longest_patch: int = 0,
        *,
        bf16: bool = False,
        compile: bool = False,
        device: torch.device | str = "cpu",
    ):
        self.model, self.longest_patch, self.bf16 = model, longest_patch, bf16
        self.device = torch.device(device)
        self._compiled: set[tuple[int, ...]] | None = set() if compile else None
        self._sum: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]] = self.losses
        if compile:
            allow_compilations()
            self._sum = torch.compile(self.losses, fullgraph=True, dynamic=False)

    @property
    def compiles(self) -> bool:
        """Whether a step is compiled as one graph."""
        return self._compiled is not None

    def must_compile(self, batch: Batch) -> bool:
        """Whether the next call on rows of this shape compiles. True once for each shape."""
        if self._compiled is None or batch.ids.shape in self._compiled:
            return False
        self._compiled.add(batch.ids.shape)
        return True

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The `losses` of a batch."""
        lengths = None if batch.patch_lengths is None else self.tensor(batch.patch_lengths)
        return self._sum(self.tensor(batch.ids), self.tensor(batch.targets), self.tensor(batch.mask), lengths)

    def tensor(self, array: object) -> Tensor:
        """On the device, integers as int64. A copy from pinned memory does not wait for what the GPU computes."""
        tensor = torch.as_tensor(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        tensor = tensor.to(self.device, non_blocking=True)
        return tensor if tensor.dtype == torch.bool else tensor.long()

    def losses(
        self, ids_BN: Tensor, targets_BN: Tensor, mask_BN: Tensor, lengths_BP: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The sum of nats over the unmasked targets, and those of each target [B * N], 0 where it is masked, without
        gradients; not compiled. Arguments as in `Batch`, on the device."""
        with self._autocast():
            if lengths_BP is None:
                logits_BNV = self.model(ids_BN)
            else:
                logits_BNV = self.model(ids_BN, lengths_BP, self.longest_patch)
        loss_BN = F.cross_entropy(logits_BNV.float().flatten(0, 1), targets_BN.flatten(), reduction="none")
        loss_BN = loss_BN * mask_BN.flatten()
        return loss_BN.sum(), loss_BN.detach()

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()


def allow_compilations() -> None:
    """Lets torch compile a function for as many shapes as a run has, for the rest of the process.

    Beyond torch's own limit, a function that must be one graph would be an error.
    """
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, MAX_COMPILATIONS)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 2 * MAX_COMPILATIONS)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
