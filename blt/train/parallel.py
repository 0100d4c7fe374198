"""Several processes as one trainer: `torchrun`, and fully sharded parameters (FSDP2).

Every rank reads the same global batch and takes its rows, so the data's order does not depend on the number of ranks.
Gradients are summed, and the loss is divided by the targets of the global batch, so neither does the step, up to
rounding. Losses and decisions (stop, skip, signals) are those of all ranks together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from blt.model.layers import Block
from blt.train.objective import allow_compilations
from blt_runtime.errors import BltError, ConfigError, UsageError

PATIENCE = timedelta(days=1)
"""How long ranks wait for the first one, which may compute the entropies of all data."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among all of them. `control` carries objects and checkpoints' plans, None for one process."""

    rank: int = 0
    world: int = 1
    control: Any = None

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, n_rows: int) -> tuple[int, int]:
        """First and last + 1 of a global batch's rows that this rank computes."""
        share = n_rows // self.world
        return self.rank * share, (self.rank + 1) * share

    def sum(self, *values: float) -> list[float]:
        """Sums over ranks, in float64."""
        if self.alone:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return list(total.tolist())

    def add_up(self, tensor: Tensor) -> None:
        """In place, the sum over ranks of equal tensors."""
        if not self.alone:
            dist.all_reduce(tensor)

    def first_does(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on the first rank, on all; the others wait. An error there is an error everywhere."""
        if self.alone:
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

    def first_before_others(self, work: Callable[[], Result]) -> Result:
        """`work` on every rank, but the first one alone before: it leaves files that the others find."""
        done: list[Result] = []
        self.first_does(lambda: done.append(work()))
        return done[0] if done else work()


ONE = Ranks()


@contextmanager
def processes(device: str) -> Iterator[tuple[Ranks, str]]:
    """Joins the processes that torchrun started; yields the ranks and this one's device.

    Raises UsageError if WORLD_SIZE says several and the rest of torchrun's environment is missing.
    """
    world = _number("WORLD_SIZE", 1)
    if world == 1:
        yield ONE, device
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(f"WORLD_SIZE is {world} but {', '.join(missing)} missing; start several processes by torchrun")
    if device.startswith("cuda"):
        device = f"cuda:{_number('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(dist.get_rank(), world, control), device
    finally:
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdigit():
        raise UsageError(f"{name} is {text!r}, not a number; start several processes by torchrun")
    return int(text)


def check_rows(n_rows: int, micro_rows: int | None, world: int) -> int:
    """Rows of a micro-batch. Raises ConfigError unless rows divide evenly among ranks and micro-batches."""
    share = n_rows // world
    micro = min(micro_rows or share, share)
    if n_rows % world or share % max(1, micro):
        parts = f"{world} ranks" + (f" and micro-batches of {micro_rows}" if micro_rows else "")
        raise ConfigError(f"batch.rows {n_rows} cannot be divided evenly among {parts}; choose another number")
    return micro


def shard(
    model: nn.Module,
    ranks: Ranks,
    device: torch.device,
    compile: bool = False,
    apart: Collection[Tensor] = (),
) -> None:
    """Each rank keeps a part of every parameter: blocks are gathered one by one as they are needed, the rest at once.

    compile: each block, one graph per shape, with and without gradients.  apart: parameters that stay whole.

    Products are in the run's dtype by autocast, as on one rank; parameters, gradients and their sums are float32.
    """
    if ranks.alone:
        return
    if compile:
        allow_compilations()
    mesh = init_device_mesh(device.type, (ranks.world,))
    for module in model.modules():
        if isinstance(module, Block):
            if compile:
                # the forward alone: FSDP's hooks around the module cannot be compiled
                module.__dict__["forward"] = torch.compile(module.forward, fullgraph=True, dynamic=False)
            fully_shard(module, mesh=mesh)
    whole = {parameter for parameter in model.parameters() if any(parameter is tensor for tensor in apart)}
    fully_shard(model, mesh=mesh, ignored_params=whole)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums: the loss is divided by the global number of targets
            module.set_force_sum_reduction_for_comms(True)


@contextmanager
def accumulating(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients of all micro-batches but the last stay on their rank."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    yield


def make_whole(model: nn.Module) -> None:
    """Every parameter whole again, on every rank: for the end of a run, the model computes no more."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                module.register_parameter(name, nn.Parameter(parameter.full_tensor(), parameter.requires_grad))
