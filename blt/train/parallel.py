"""Several processes as one trainer: `torchrun`, and fully sharded parameters (FSDP2).

Every rank plans the same global batches, and reads and computes its share of their rows, so the order of the data does
not depend on the number of ranks. Gradients are summed and the loss is divided by the targets of the global batch, so
the step does not depend on it either, up to rounding. Losses and decisions (stop, skip, signals) are those of all
ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from blt.data.batches import Share
from blt.model.layers import Block
from blt.train.config import BatchConfig
from blt.train.objective import allow_compilations
from blt.train.recompute import parts
from blt_runtime.errors import BltError, ConfigError, UsageError

CONTROL_TIMEOUT = timedelta(days=1)
"""How long ranks wait for the first one, which may compute the entropies of a sample and of the validation text."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among all `world` processes.

    `control` is the process group for objects and checkpoint plans; None for a single process.
    """

    rank: int = 0
    world: int = 1
    control: Any = None

    @property
    def single(self) -> bool:
        return self.world == 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sums over ranks, in float64."""
        if self.single:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return list(total.tolist())

    def largest(self, *values: float) -> list[float]:
        """The largest of each over ranks, in float64."""
        if self.single:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.control)
        return list(found.tolist())

    def all_reduce(self, tensor: Tensor) -> None:
        """Sums `tensor` over ranks, in place; it has the same shape on each."""
        if not self.single:
            dist.all_reduce(tensor)

    def norm(self, norm: Tensor) -> Tensor:
        """The 2-norm of all ranks' vectors, of which this rank's has the 2-norm `norm`."""
        square = norm.double().square()
        self.all_reduce(square)
        return square.sqrt().to(norm)

    def share(self, rows: Tensor, micro_rows: int | None) -> Tensor:
        """This rank's rows of a global batch, [B, ...]: ranks take turns by `micro_rows` rows (None: all of them)."""
        return rows if self.single else rows[Share(self.rank, self.world, micro_rows).rows(len(rows))]

    def exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Sends the first `sent[0]` rows to rank 0, the next `sent[1]` to rank 1, ...; returns the rows that the ranks
        send to this one, `received[r]` of rank r, in the order of ranks."""
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent)
        return arrived

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on the first rank and returns its result on all ranks; an error is raised on all of them."""
        if self.single:
            return work()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = work()
            except (BltError, OSError) as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, group=self.control)
        if answer[1] is not None:
            raise answer[1]
        result: Result = answer[0]
        return result

    def on_each(self, work: Callable[[], None]) -> None:
        """Runs `work` on every rank at once; the error of one of them is raised on all."""
        self.from_each(work)

    def from_each(self, work: Callable[[], Result]) -> list[Result]:
        """Runs `work` on every rank at once and returns their results, in the order of ranks; the error of one of them
        is raised on all."""
        if self.single:
            return [work()]
        answer: tuple[Any, Exception | None]
        try:
            answer = work(), None
        except (BltError, OSError) as raised:
            answer = None, raised
        answers: list[Any] = [None] * self.world
        dist.all_gather_object(answers, answer, group=self.control)
        if found := next((error for _, error in answers if error is not None), None):
            raise found
        return [result for result, _ in answers]

    def apart(self) -> Ranks:
        """The same ranks with another control group, whose calls another thread may mix with those of this one. Every
        rank calls it."""
        if self.single:
            return self
        return replace(self, control=dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))

    def first_then_others(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on the first rank, then on the others, which find the files that the first one wrote."""
        done: list[Result] = []
        self.on_first(lambda: done.append(work()))
        return done[0] if done else work()


SINGLE = Ranks()


@contextmanager
def processes(device: str) -> Iterator[tuple[Ranks, str]]:
    """Joins the processes that torchrun started; yields this process's `Ranks` and its device.

    Raises UsageError if WORLD_SIZE is above 1 and the rest of torchrun's environment is missing.
    """
    world = _number("WORLD_SIZE", 1)
    if world == 1:
        yield SINGLE, device
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(f"WORLD_SIZE is {world} but {', '.join(missing)} missing; start several processes by torchrun")
    if device.startswith("cuda"):
        device = f"cuda:{_number('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        yield Ranks(dist.get_rank(), world, control), device
    finally:
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit():
        raise UsageError(f"{name} is {text!r}, not a number; start several processes by torchrun")
    return int(text)


def micro_rows(batch: BatchConfig, world: int) -> int:
    """The rows of a micro-batch on each of `world` ranks. Raises ConfigError."""
    return check_rows(batch.rows, batch.micro_rows, world, buckets=len(batch.byte_buckets))


def check_rows(n_rows: int, micro_rows: int | None, world: int, buckets: int = 1) -> int:
    """The number of rows in a micro-batch, by default at most so many that a batch has one micro-batch for each of the
    `buckets`. Raises ConfigError unless rows divide evenly among ranks and micro-batches."""
    share = n_rows // world
    if micro_rows is None:
        micro = max((n for n in range(1, share + 1) if share % n == 0 and n * buckets <= n_rows), default=1)
    else:
        micro = min(micro_rows, share)
    if n_rows % world or share % max(1, micro):
        parts = f"{world} ranks" + (f" and micro-batches of {micro_rows}" if micro_rows else "")
        raise ConfigError(f"batch.rows {n_rows} cannot be divided evenly among {parts}; choose another number")
    return micro


def ranks_of_a_group(shard_ranks: int | None, world: int) -> int:
    """`run.shard_ranks`, by default all `world` ranks. Raises ConfigError unless groups of so many divide them."""
    group = shard_ranks or world
    if world % group:
        raise ConfigError(
            f"run.shard_ranks {group} does not divide the {world} rank{'s' * (world > 1)} of this run; "
            "choose a divisor, or null for one group of all ranks"
        )
    return group


def shard(
    model: nn.Module,
    ranks: Ranks,
    device: torch.device,
    *,
    group: int | None = None,
    bf16: bool = False,
    compile: bool = False,
    by_row: Collection[Tensor] = (),
) -> None:
    """Splits every parameter of a model on the meta device over the ranks; nothing is allocated (`blt.model.init`).

    The matrices of each block are gathered when it is needed, everything else at once.  compile: each part of
    `blt.train.recompute` alone, blocks and cross-attention, one graph per shape, with and without gradients.  by_row:
    parameters whose rows are divided among the ranks outside of FSDP, so that they are never gathered
    (`blt.train.tables`).

    group: so many consecutive ranks share the parameters, and other groups are replicas (HSDP): parameters are gathered
    within a group, and gradients are reduced there and then summed over groups. None: all ranks. Rows of `by_row` are
    divided among all ranks in any case: their exchange moves only what a batch touches, and no two ranks need agree
    on the updates of a row. Raises ConfigError as `ranks_of_a_group`.

    bf16: the matrices of blocks are cast before they are gathered instead of after it, which moves half the bytes and
    rounds in the same way. Products outside of blocks are in bfloat16 by autocast, as on one rank. Norms and embeddings
    stay float32, and so do parameters, gradients and their sums. The gradients of every micro-batch are reduced and
    scattered at once and added to this rank's shards, so that whole ones of all blocks are never in memory together.
    """
    if ranks.single:
        return
    if compile:
        allow_compilations()
        for module, name in parts(model):  # only methods: FSDP's hooks around modules cannot be compiled
            module.__dict__[name] = torch.compile(getattr(module, name), fullgraph=True, dynamic=False)
    row_mesh = mesh = init_device_mesh(device.type, (ranks.world,))
    group = ranks_of_a_group(group, ranks.world)
    if group < ranks.world:
        mesh = init_device_mesh(device.type, (ranks.world // group, group), mesh_dim_names=("replicate", "shard"))
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    apart = {parameter for block in blocks for parameter in matrices(block)}
    apart |= {
        _divide(model, name, ranks, row_mesh)
        for name, p in list(model.named_parameters())
        if any(p is t for t in by_row)
    }
    # The model before its blocks: FSDP has one dtype for what it gathers together, so norms of blocks are the model's.
    fully_shard(model, mesh=mesh, ignored_params=apart)
    # A block's input stays float32: autocast casts what each product reads, and the sum over blocks is not rounded.
    dtypes = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        norms = set(block.parameters()) - apart
        fully_shard(block, mesh=mesh, ignored_params=norms, mp_policy=dtypes if bf16 else MixedPrecisionPolicy())
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums: the loss is divided by the global number of targets
            module.set_force_sum_reduction_for_comms(True)


def matrices(block: Block) -> list[nn.Parameter]:
    """The parameters of a block that autocast casts: those of its products."""
    return [module.get_parameter("weight") for module in block.modules() if isinstance(module, nn.Linear)]


def rows_per_rank(rows: int, world: int) -> int:
    """The rows of a tensor on each of `world` ranks. The last ranks have fewer if they do not divide: as in DTensor."""
    return -(-rows // world)


def _divide(model: nn.Module, name: str, ranks: Ranks, mesh: DeviceMesh) -> nn.Parameter:
    """Replaces a parameter by one that has this rank's rows only, in memory of their own."""
    prefix, _, key = name.rpartition(".")
    module = model.get_submodule(prefix)
    whole_RD = module.get_parameter(key).detach()
    each = rows_per_rank(len(whole_RD), ranks.world)
    own_RD = whole_RD[ranks.rank * each : (ranks.rank + 1) * each].clone()
    parameter = nn.Parameter(part_of(own_RD, len(whole_RD), mesh))
    module.register_parameter(key, parameter)
    return parameter


def part_of(own_R: Tensor, rows: int, mesh: DeviceMesh) -> DTensor:
    """The tensor with so many rows of which `own_R` holds this rank's, in the same memory."""
    shape = torch.Size((rows, *own_R.shape[1:]))
    return DTensor.from_local(own_R, mesh, [Shard(0)], run_check=False, shape=shape, stride=own_R.stride())


def reshard(model: nn.Module) -> None:
    """Frees the whole parameters that FSDP has gathered, so that the next pass gathers the present ones."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
