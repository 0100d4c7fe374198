"""What a training step holds in memory, counted by running one on tensors without data (torch's `FakeTensorMode`).

`LiveBytes` follows the storages that operations make, from their first use until they are freed. So it counts what
autograd saves, the inputs that recomputation keeps, autocast's copies of the weights, and the temporary tensors of both
passes. It does not count what an allocator wastes, what a kernel needs inside, or what a compiler leaves out.

Operations are those of a CPU without compilation. CUDA's kernels keep about as much: its fused RMSNorm less, and its
attention kernel as much.
"""

from __future__ import annotations

import warnings
import weakref
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blt.model import BLT, EntropyModel
from blt.model.hashing import HashEmbedding, Touched
from blt.model.layers import Block
from blt.train import parallel
from blt.train.config import BLTRun, OptimizerConfig, RunConfig
from blt.train.models import make_model
from blt.train.objective import Objective
from blt.train.parallel import micro_rows, ranks_of_a_group, rows_per_rank
from blt.train.parameters import is_hidden_matrix, sparse_table
from blt.train.tables import capacity_for

FLOAT = 4
MOMENTS = 2
"""AdamW's, float32 like weights and gradients. Muon has one."""


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that operations made while inside and that still exist: `now`, and their `peak`.

    `model`: its parameters and buffers exist already and are not counted, although operations return views of them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._existing = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._known: dict[int, tuple[int, weakref.ref[Any]]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def forget(self, tensor: Tensor) -> None:
        """Does not count the storage of `tensor` any longer."""
        self._remove(tensor.untyped_storage()._cdata)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known and key not in self._existing:
            self._known[key] = storage.nbytes(), weakref.ref(storage, lambda _: self._remove(key))
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _remove(self, key: int) -> None:
        self.now -= self._known.pop(key, (0, None))[0]


class MicroBatch(NamedTuple):
    """Bytes that the forward pass of a micro-batch keeps for its backward pass, and the most that both passes hold.

    Weights and moments are not included, and gradients only if they are not added to earlier ones.
    """

    kept: int
    peak: int


def memory(config: RunConfig, ranks: int = 1) -> dict[str, int]:
    """Estimated bytes in memory of each of `ranks` processes, at the peak of a step.

    weights_and_optimizer: weights, their averages (`optimizer.ema`), moments and, if a step has several micro-batches
    or ranks, gradients. A group of `run.shard_ranks` ranks shares them; rows of sparse tables are divided among all
    ranks.
    touched: copies of the rows of sparse tables that a batch may touch at most; with several ranks those that a rank
    fetches, and of the rows that it owns its share of those that all ranks fetch.
    gathered (FSDP, by formula): whole parameters: the matrices of two blocks, in the dtype of the run, and the rest.
    activations: what a micro-batch keeps for its backward pass.
    temporary: what both passes hold on top of that, the gradients of a step's only micro-batch included. With several
    ranks it has room for the whole gradients of that rest, and for the buffer that reduces them.

    Rows have the longest of `batch.byte_buckets`. FlexAttention is counted as blocks and masks.
    Raises ConfigError if the rows cannot be divided among the ranks, or the ranks into groups of `run.shard_ranks`, and
    for patterns of `optimizer.freeze`.
    """
    rows = micro_rows(config.batch, ranks)
    adds = config.batch.rows > rows
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("ignore")  # torch's, about float32 norm weights in bfloat16
        model = make_model(config)
        table = sparse_table(model, config.optimizer)
        touched = 0 if table is None else _touch(model, table, config, rows, ranks)
        matrices = _matrices(model, gathered_as=config.run.dtype if ranks > 1 else None)
        found = _count(model, config, rows, adds=adds)
    named = {name: p for name, p in model.named_parameters() if p is not table}
    shared = list(named.values())
    state = sum(_state(name, p, config.optimizer, adds) for name, p in named.items())
    state //= ranks_of_a_group(config.run.shard_ranks, ranks)
    if table is not None:
        state += FLOAT * (1 + MOMENTS) * table.shape[1] * rows_per_rank(len(table), ranks)
    gathered, peak = 0, found.peak
    if ranks > 1:
        others = sum(parameter.numel() for parameter in shared)
        others -= sum(parameter.numel() for parameter in chain.from_iterable(matrices))
        gathered = FLOAT * others + 2 * max(sum(p.nbytes for p in block) for block in matrices)
        peak = max(peak, FLOAT * 2 * others)
    parts = {
        "weights_and_optimizer": state,
        "touched": touched,
        "gathered": gathered,
        "activations": found.kept,
        "temporary": peak - found.kept,
    }
    return {**parts, "total": sum(parts.values())}


def _touch(model: nn.Module, table: nn.Parameter, config: RunConfig, rows: int, ranks: int) -> int:
    """Gives the model the touched rows of sparse tables; returns the bytes of their copies.

    At most, every position of the global batch touches another row of every table.
    """
    embedding = model.hash_embedding
    assert isinstance(embedding, HashEmbedding)
    length, tables = config.batch.byte_buckets[-1], embedding.config.n_tables
    touched, fetched = (min(len(table), n * length * tables) for n in (config.batch.rows, config.batch.rows // ranks))
    capacity = capacity_for(fetched, len(table))
    table.requires_grad_(False)
    leaf_CD = torch.zeros(capacity, table.shape[1], requires_grad=True)
    embedding.touched = Touched(leaf_CD, torch.zeros(rows, length, tables, dtype=torch.long))
    values = (1 + MOMENTS) * rows_per_rank(touched, ranks)
    return FLOAT * table.shape[1] * (values + 2 * capacity)  # the leaf and its gradient


def _count(model: BLT | EntropyModel, config: RunConfig, rows: int, *, adds: bool) -> MicroBatch:
    """adds: gradients are added to those of earlier micro-batches, which are part of the state."""
    longest = config.patching.longest_patch if isinstance(config, BLTRun) else 0
    objective = Objective(model, longest, bf16=config.run.dtype == "bf16")
    live = LiveBytes(model)
    for leaf in _leaves(model, parameters=adds):
        leaf.register_post_accumulate_grad_hook(partial(_forget_gradient, live))
    with torch.enable_grad(), live:
        ids_BN = torch.zeros(rows, config.batch.byte_buckets[-1], dtype=torch.long)
        lengths_BP = None
        if config.batch.patches is not None:
            lengths_BP = torch.zeros(rows, config.batch.patches, dtype=torch.long)
        total = objective.losses(ids_BN, torch.zeros_like(ids_BN), ids_BN == 0, lengths_BP)[0]
        kept = live.now
        total.backward()
    return MicroBatch(kept, live.peak)


def _leaves(model: nn.Module, *, parameters: bool) -> list[Tensor]:
    """The leaves whose gradients are counted elsewhere: touched rows, and the parameters."""
    found: list[Tensor] = [p for p in model.parameters() if p.requires_grad and parameters]
    touched = getattr(getattr(model, "hash_embedding", None), "touched", None)
    return found if touched is None else [*found, touched.rows]


def _forget_gradient(live: LiveBytes, leaf: Tensor) -> None:
    assert leaf.grad is not None
    live.forget(leaf.grad)


def _state(name: str, parameter: nn.Parameter, config: OptimizerConfig, adds: bool) -> int:
    moments = 1 if config.name == "muon" and is_hidden_matrix(name, parameter) else MOMENTS
    averages = int(config.ema is not None)
    numbers = 1 + moments + adds + averages if parameter.requires_grad else 1
    return FLOAT * numbers * parameter.numel()


def _matrices(model: nn.Module, *, gathered_as: str | None) -> list[list[nn.Parameter]]:
    """The matrices of each block. FSDP gathers them in the dtype of the run, so that autocast makes no copies."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    found = [parallel.matrices(block) for block in blocks]
    for parameter in chain.from_iterable(found):
        if gathered_as == "bf16":
            parameter.data = parameter.data.bfloat16()
    return found
