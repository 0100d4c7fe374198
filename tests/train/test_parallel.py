"""Two processes under torchrun compute the same as one, resume from each other's checkpoints, and survive a kill."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from blt.checkpoint import models
from blt.model import BLT
from blt.model.layers import Block
from blt.train import Trainer, parallel, spikes, train
from blt.train.config import BLTRun, RunConfig, load_config
from blt.train.setup import prepare_run
from blt.train.traffic import traffic
from blt_runtime.errors import ConfigError, UsageError
from tests.train.small import ONE_LAYER

STEPS, HALF = 12, 6
SETTINGS = (
    f"schedule={{steps: {STEPS}, warmup: 2}}", "run.log_every=1", f"run.checkpoint_every={HALF}", "run.valid_every=6",
    "patching.scheme=space", "batch.micro_rows=1",
)  # fmt: skip


def config_of(repo: Path) -> RunConfig:
    return load_config(repo / "configs" / "tiny.yaml", SETTINGS)


def start(
    repo: Path,
    out: Path,
    data: Path,
    resume: str = "auto",
    *settings: str,
    program: Sequence[str] = ("-m", "blt.cli"),
    ranks: int = 2,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[bytes]:
    """The documented command."""
    paths = os.pathsep.join(str(repo / part) for part in (".", "export", "runtime"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *program]
    arguments = ["train", "blt", "-c", str(repo / "configs" / "tiny.yaml"), "-o", str(out), "--data", str(data)]
    arguments += ["--threads", "1", "--device", "cpu", "--resume", resume]
    arguments += [word for setting in SETTINGS + settings for word in ("--set", setting)]
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen(command + arguments, env=variables, stdout=subprocess.PIPE)


def with_ranks(
    ranks: int,
    repo: Path,
    out: Path,
    data: Path,
    resume: str = "auto",
    *settings: str,
    program: Sequence[str] = ("-m", "blt.cli"),
) -> Path:
    process = start(repo, out, data, resume, *settings, program=program, ranks=ranks)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0
    assert printed.decode().split() == [str(out / "model.pt")]  # only the first rank prints
    return out


two_ranks = partial(with_ranks, 2)


def records(out: Path) -> list[dict[str, Any]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    clocks = ("seconds", "bytes_per_s", "flops_per_s", "memory_bytes", "data_wait_s", "data_wait")
    return [{key: value for key, value in json.loads(line).items() if key not in clocks} for line in lines]


def same_within_rounding(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert [a["step"], a["bytes"], a.get("buckets")] == [b["step"], b["bytes"], b.get("buckets")]
        for key in a.keys() & {"loss", "bpb", "norm", "valid_bpb"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4)


@pytest.fixture(scope="module")
def one_rank(repo: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks") / "one"
    train(config_of(repo), out, data=data)
    return out


@pytest.fixture(scope="module")
def both_ranks(repo: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_ranks(repo, tmp_path_factory.mktemp("ranks") / "two", data)


@pytest.mark.slow
def test_two_ranks_match_one(one_rank: Path, both_ranks: Path) -> None:
    same_within_rounding(records(both_ranks), records(one_rank))
    assert sum("valid_bpb" in record for record in records(both_ranks)) == 2
    ours, theirs = (models.load(out).require_blt()[0].state_dict() for out in (both_ranks, one_rank))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-2, atol=1e-3), name
    shards = sorted(path.name for path in (both_ranks / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors"))
    assert [name[:11] for name in shards] == ["shard-00001", "shard-00002"]


SPARSE = ("optimizer.tables=sparse", "batch.rows=6")


@pytest.fixture(scope="module")
def sharded_tables(repo: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables outside FSDP, activation checkpointing inside."""
    out = tmp_path_factory.mktemp("ranks") / "sharded"
    return two_ranks(repo, out, data, "none", *SPARSE, "run.activation_checkpointing=true")


@pytest.mark.slow
def test_two_ranks_with_sharded_tables_match_one_with_dense(
    repo: Path, data: Path, sharded_tables: Path, tmp_path: Path
) -> None:
    train(load_config(repo / "configs" / "tiny.yaml", [*SETTINGS, "batch.rows=6"]), tmp_path / "run", data=data)
    same_within_rounding(records(sharded_tables), records(tmp_path / "run"))
    ours, theirs = (models.load(out).require_blt()[0].hash_embedding for out in (sharded_tables, tmp_path / "run"))
    assert ours is not None
    assert theirs is not None
    for table in range(ours.config.n_tables):
        assert torch.allclose(ours.table(table), theirs.table(table), rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_continue_with_the_tables_of_two(
    repo: Path, data: Path, sharded_tables: Path, tmp_path: Path, ranks: int
) -> None:
    """Two of them bit for bit."""
    half = str(sharded_tables / "checkpoints" / f"step-{HALF:08d}")
    settings = (*SPARSE, "run.activation_checkpointing=true")
    if ranks == 1:
        train(
            load_config(repo / "configs" / "tiny.yaml", [*SETTINGS, *settings]),
            tmp_path / "run",
            data=data,
            resume=half,
        )
    else:
        with_ranks(ranks, repo, tmp_path / "run", data, half, *settings)
    expected = [record for record in records(sharded_tables) if record["step"] > HALF]
    same_within_rounding(records(tmp_path / "run"), expected)
    if ranks == 2:
        assert records(tmp_path / "run") == expected
        ours, theirs = (models.load(out).require_blt()[0].state_dict() for out in (tmp_path / "run", sharded_tables))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# After each micro-batch: the sizes of all gradients of this process, also of tensors that are not the model's own
# (FSDP's whole ones), and of what collectives moved since the last one.
MEASURED = """
import gc, json, os, sys
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from blt.cli import main

def size(tensor):
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()

def gradients():
    leaves = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor) and found.is_leaf]
    return list({id(leaf.grad): leaf.grad for leaf in leaves if leaf.grad is not None}.values())

moved = {"reduced": 0, "gathered": 0}

def count(key, *names):
    name = next(name for name in names if hasattr(dist, name))  # as this version of torch calls it
    collective = getattr(dist, name)
    def call(*arguments, **options):
        tensors = [found for found in (*arguments, *options.values()) if isinstance(found, torch.Tensor)]
        moved[key] += max(map(size, tensors))
        return collective(*arguments, **options)
    setattr(dist, name, call)

count("reduced", "reduce_scatter_single", "reduce_scatter_tensor")
count("gathered", "all_gather_single", "all_gather_into_tensor")
backward, records = torch.Tensor.backward, []

def measured(self, *arguments, **options):
    backward(self, *arguments, **options)
    found = gradients()
    records.append({"kept": sum(map(size, found)), "dtypes": sorted({str(g.dtype) for g in found}), **moved})
    moved.update(reduced=0, gathered=0)

torch.Tensor.backward = measured
try:
    main()
finally:
    with open(os.path.join(os.environ["MEASURED"], os.environ["RANK"] + ".json"), "w") as file:
        json.dump(records, file)
"""


def sizes(config: RunConfig) -> tuple[list[torch.Size], list[torch.Size]]:
    """The shapes of all parameters of a BLT, and of the matrices of its blocks."""
    assert isinstance(config, BLTRun)
    with torch.device("meta"):
        model = BLT(config.model)
    matrices = [
        matrix.shape for block in model.modules() if isinstance(block, Block) for matrix in parallel.matrices(block)
    ]
    return [parameter.shape for parameter in model.parameters()], matrices


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_of_micro_batches_are_shards_and_gathers_have_the_dtype_of_the_run(
    repo: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Losses and norms are those of one process, where autocast casts the matrices."""
    (tmp_path / "measured.py").write_text(MEASURED)
    monkeypatch.setenv("MEASURED", str(tmp_path))
    settings = ("schedule={steps: 2, warmup: 1}", "model.hash.rows=3001", f"run.dtype={dtype}")
    two_ranks(repo, tmp_path / "run", data, "none", *settings, program=[str(tmp_path / "measured.py")])
    config = load_config(repo / "configs" / "tiny.yaml", [*SETTINGS, *settings])
    train(config, tmp_path / "one", data=data)
    same_within_rounding(records(tmp_path / "run"), records(tmp_path / "one"))
    shapes, matrices = sizes(config)
    whole, of_blocks = (sum(2 * -(-n // 2) * math.prod(rest) for n, *rest in some) for some in (shapes, matrices))
    # FSDP gathers everything for the forward pass, and the matrices of blocks once more for the backward pass.
    gathered = 4 * (whole - of_blocks) + 2 * of_blocks * (2 if dtype == "bf16" else 4)
    for rank in (0, 1):
        halves = [4 * (-(-n // 2) if rank == 0 else n // 2) * math.prod(rest) for n, *rest in shapes]
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(found) == 2 * 2  # steps x micro-batches of a rank
        assert [record["kept"] for record in found] == [sum(halves)] * 4
        assert all(record["dtypes"] == ["torch.float32"] for record in found)
        assert [(record["reduced"], record["gathered"]) for record in found] == [(4 * whole, gathered)] * 4
    halves_of_two = traffic(config, 2)  # of both micro-batches; half of every tensor is the rank's own
    assert halves_of_two["gradients"] == pytest.approx(4 * whole, rel=0.001)
    assert halves_of_two["gathers"] == pytest.approx(gathered, rel=0.001)


@pytest.mark.slow
def test_two_groups_of_two_ranks_match_one_process(
    repo: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HSDP: gathers within a group, gradients of all groups, sparse tables over all ranks, and checkpoints."""
    (tmp_path / "measured.py").write_text(MEASURED)
    monkeypatch.setenv("MEASURED", str(tmp_path))
    settings = ("schedule={steps: 4, warmup: 1}", "run.checkpoint_every=2", "optimizer.tables=sparse")
    grouped = [*settings, "run.shard_ranks=2"]
    out = with_ranks(4, repo, tmp_path / "four", data, "none", *grouped, program=[str(tmp_path / "measured.py")])
    config = load_config(repo / "configs" / "tiny.yaml", [*SETTINGS, *settings])
    train(config, tmp_path / "one", data=data)
    same_within_rounding(records(out), records(tmp_path / "one"))
    ours, theirs = (models.load(run).require_blt()[0].state_dict() for run in (out, tmp_path / "one"))
    assert all(torch.allclose(tensor, theirs[name], rtol=1e-2, atol=1e-3) for name, tensor in ours.items())
    shapes, matrices = sizes(config)
    shapes = shapes[1:]  # the tables
    whole, of_blocks = (sum(4 * 2 * -(-n // 2) * math.prod(rest) for n, *rest in some) for some in (shapes, matrices))
    for rank in range(4):
        halves = [4 * (-(-n // 2) if rank % 2 == 0 else n // 2) * math.prod(rest) for n, *rest in shapes]
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert [(record["reduced"], record["gathered"]) for record in found] == [(whole, whole + of_blocks)] * 4
        leaf = [record["kept"] - sum(halves) for record in found]  # the gradient of the touched rows
        assert all(0 < size <= 4 * 16 * 2 * 101 for size in leaf)
    half = str(out / "checkpoints" / "step-00000002")
    train(config, tmp_path / "resumed", data=data, resume=half)
    same_within_rounding(records(tmp_path / "resumed"), [record for record in records(out) if record["step"] > 2])


@pytest.mark.parametrize(("shard_ranks", "world", "group"), [(None, 1, 1), (None, 6, 6), (2, 6, 2), (6, 6, 6)])
def test_groups_of_ranks(shard_ranks: int | None, world: int, group: int) -> None:
    assert parallel.ranks_of_a_group(shard_ranks, world) == group


@pytest.mark.parametrize(("shard_ranks", "world"), [(4, 6), (8, 4), (2, 1)])
def test_ranks_that_groups_do_not_divide(shard_ranks: int, world: int) -> None:
    with pytest.raises(ConfigError, match=f"run.shard_ranks {shard_ranks} does not divide the {world} rank"):
        parallel.ranks_of_a_group(shard_ranks, world)


def test_a_wrong_group_is_refused_before_data_are_read(repo: Path, tmp_path: Path) -> None:
    config = load_config(repo / "configs" / "tiny.yaml", [*SETTINGS, "run.shard_ranks=2"])
    with pytest.raises(ConfigError, match="does not divide the 1 rank of this run"):
        train(config, tmp_path / "run", data=tmp_path / "none")


# Before its first step, every rank stores what it holds, and the most that it ever held until then. Tensors in a mapped
# checkpoint are not held: the system drops their pages when it needs memory. Copies of them are.
STARTED = """
import os
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from blt.cli import main
from blt.train.loop import Trainer
from blt.train.memory import LiveBytes

def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

def is_of_a_file(storage):
    for line in open("/proc/self/maps"):
        begin, end = (int(address, 16) for address in line.split()[0].split("-"))
        if begin <= storage.data_ptr() < end:
            return line.rstrip().endswith((".pt", ".safetensors"))
    return False

class Held(LiveBytes):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        tree_map_only(torch.Tensor, lambda tensor: self._add(local(tensor).untyped_storage()), result)
        return result

    def _add(self, storage):
        if storage.device.type != "meta" and (storage._cdata in self._known or not is_of_a_file(storage)):
            super()._add(storage)

held = Held(nn.Module())

def started(self, steps):
    held.__exit__(None, None, None)
    state = {name: tensor for name, tensor in self.state.state_dict().tensors.items() if name != "rng"}
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}
    size = sum(local(t).numel() * t.element_size() for name, t in state.items() if name.startswith("model."))
    torch.save((whole, size, held.peak), os.path.join(os.environ["STARTED"], os.environ["RANK"] + ".pt"))
    dist.barrier()
    os._exit(0)

Trainer.run = started
held.__enter__()
main()
"""


def started(repo: Path, folder: Path, data: Path, resume: str, *settings: str) -> list[Any]:
    """Of two ranks before their first step: whole tensors, bytes of a rank's weights, and the most that it held."""
    folder.mkdir()
    (folder / "started.py").write_text(STARTED)
    environment = {"STARTED": str(folder)}
    process = start(
        repo, folder / "run", data, resume, *settings, program=[str(folder / "started.py")], environment=environment
    )
    process.communicate(timeout=300)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


LARGE = "model.hash={sizes: [3, 4], rows: 60013}"
"""Tables that most of the bytes are in: 8 MB, eight blocks of the generator, of which two are in memory at a time."""


@pytest.mark.slow
def test_ranks_start_from_the_weights_of_one_and_never_hold_the_whole(repo: Path, data: Path, tmp_path: Path) -> None:
    config = load_config(repo / "configs" / "tiny.yaml", [*SETTINGS, LARGE])
    model = prepare_run(config, tmp_path / "one", data)[0].objective.model
    for whole, held, peak in started(repo, tmp_path / "two", data, "none", LARGE):
        for name, tensor in model.state_dict().items():
            assert torch.equal(whole[f"model.{name}"], tensor), name
        size = 4 * sum(parameter.numel() for parameter in model.parameters())
        assert held == pytest.approx(size / 2, rel=0.01)
        assert peak < 0.9 * size


@pytest.mark.slow
def test_ranks_resume_without_holding_the_whole(repo: Path, data: Path, tmp_path: Path) -> None:
    """A resumed run, one that starts from a checkpoint, and the model.pt that several ranks write."""
    settings = (LARGE, "schedule={steps: 2, warmup: 1}")
    source = two_ranks(repo, tmp_path / "source", data, "none", *settings)
    model = models.load(source, trainable=True).require_blt()[0]
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    resumed = started(repo, tmp_path / "resumed", data, str(source), *settings)
    tuned = started(repo, tmp_path / "tuned", data, "none", *settings, f"init.checkpoint={source}")
    # half of the weights and of two moments, and the shard that is being read: here nearly half; half of the weights
    limits = [2.1, 2.1, 0.9, 0.9]
    for limit, (whole, held, peak) in zip(limits, resumed + tuned, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(whole[f"model.{name}"], tensor), name
        assert held == pytest.approx(size / 2, rel=0.01)
        assert peak < limit * size
    (source / "model.pt").unlink()
    stopped = models.load(source, trainable=True).require_blt()[0].state_dict()
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_one_rank_continues_where_two_stopped(repo: Path, data: Path, both_ranks: Path, tmp_path: Path) -> None:
    half = both_ranks / "checkpoints" / f"step-{HALF:08d}"
    train(config_of(repo), tmp_path / "run", data=data, resume=str(half))
    expected = [record for record in records(both_ranks) if record["step"] > HALF]
    same_within_rounding(records(tmp_path / "run"), expected)


@pytest.mark.slow
def test_two_ranks_continue_where_one_stopped(repo: Path, data: Path, one_rank: Path, tmp_path: Path) -> None:
    half = one_rank / "checkpoints" / f"step-{HALF:08d}"
    out = two_ranks(repo, tmp_path / "run", data, str(half))
    same_within_rounding(records(out), [record for record in records(one_rank) if record["step"] > HALF])


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_are_bit_exact(repo: Path, data: Path, both_ranks: Path, tmp_path: Path) -> None:
    """Checkpoints are written in the background, those of the run that is not killed are not."""
    out, background = tmp_path / "run", "run.async_checkpoints=true"
    process = start(repo, out, data, "auto", background)
    deadline = time.monotonic() + 300
    while not list(out.glob("checkpoints/step-*")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    for pid in children.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
    for newer in (out / "checkpoints").glob(
        f"step-{STEPS:08d}"
    ):  # it finished before the kill; it resumes from the middle in any case
        shutil.rmtree(newer)
    assert records(two_ranks(repo, out, data, "auto", background)) == records(both_ranks)
    ours, theirs = (models.load(run).require_blt()[0].state_dict() for run in (out, both_ranks))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


# Dynamo traces and counts as usual, without Inductor's code, which takes minutes for so many graphs.
TRACED = """
import torch
compile = torch.compile
torch.compile = lambda function, **options: compile(function, backend="eager", **options)
from blt.cli import main
main()
"""
LENGTHS = (
    "batch={rows: 4, patches: 16, byte_buckets: [76, 82, 88, 128]}", "model.decoder.ffn_dim=48", "run.valid_every=4",
    "schedule={steps: 8, warmup: 2}",
)  # fmt: skip


@pytest.mark.slow
def test_two_ranks_compile_each_length_with_and_without_gradients(repo: Path, data: Path, tmp_path: Path) -> None:
    """More graphs of a block than torch allows by default (8): lengths x encoder, decoder x training, validation."""
    (tmp_path / "traced.py").write_text(TRACED)
    compiled = (*LENGTHS, "run.compile=true", "run.activation_checkpointing=true")
    out = two_ranks(repo, tmp_path / "two", data, "none", *compiled, program=[str(tmp_path / "traced.py")])
    train(load_config(repo / "configs" / "tiny.yaml", [*SETTINGS, *LENGTHS]), tmp_path / "one", data=data)
    same_within_rounding(records(out), records(tmp_path / "one"))
    assert len({length for record in records(out) for length in record.get("buckets", {})}) >= 3


# Validation is left out: its graphs without gradients would double the compilations.
INDUCTOR = """
import os
from torch._dynamo.utils import counters
from blt.cli import main
from blt.train.loop import Trainer

Trainer.validate = lambda self: {}
try:
    main()
finally:
    with open(os.path.join(os.environ["COUNTED"], os.environ["RANK"]), "w") as file:
        file.write(str(counters["stats"]["unique_graphs"]))
"""


@pytest.mark.slow
def test_inductors_code_of_two_ranks_matches_eager_steps(
    repo: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Selective recomputation, with cross-attention. A minute of one core: no other test runs Inductor's code here."""
    (tmp_path / "inductor.py").write_text(INDUCTOR)
    monkeypatch.setenv("COUNTED", str(tmp_path))
    monkeypatch.setattr(Trainer, "validate", lambda self: {})
    settings = (
        *ONE_LAYER, "batch.byte_buckets=[128]", "schedule={steps: 2, warmup: 1}",
        "run.activation_checkpointing=selective",
    )  # fmt: skip
    program = [str(tmp_path / "inductor.py")]
    out = two_ranks(repo, tmp_path / "two", data, "none", *settings, "run.compile=true", program=program)
    train(load_config(repo / "configs" / "tiny.yaml", [*SETTINGS, *settings]), tmp_path / "one", data=data)
    same_within_rounding(records(out), records(tmp_path / "one"))
    # local and latent blocks, pooling, the patches' keys and values, and the decoder's cross-attention
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["5", "5"]


# Muon, averages, validation by group, and a rollback from the tenth batch to step 6.
WATCHED = """
from blt.train import spikes
from blt.train.loop import Trainer

read = Trainer._read

def spoiled(self, total, norm):
    at = self.state.loader.state()
    return read(self, total + (1e5 if (at["epoch"], at["block"], at["batch"]) == (0, 0, 10) else 0), norm)

constants = {"WINDOW": 6, "BACK": 3, "SKIP": 2}
if __name__ == "__main__":
    for name, value in constants.items():
        setattr(spikes, name, value)
    Trainer._read = spoiled
    from blt.cli import main
    main()
"""
WATCHED_SETTINGS = ("optimizer={name: muon, ema: 0.8, lr: 0.01}", "run.spike_rollback=1", "run.keep_checkpoints=9")
OF_MUON = 1e-3
"""Muon's products are in bfloat16, and those of sharded matrices are rounded otherwise."""


@pytest.mark.slow
def test_two_ranks_with_muon_averages_groups_and_a_rollback(
    repo: Path, groups_of_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They match one rank. Continued from the checkpoint that they went back to, they end with the same bits."""
    (tmp_path / "watched.py").write_text(WATCHED)
    program = [str(tmp_path / "watched.py")]
    two = two_ranks(repo, tmp_path / "two", groups_of_text, "none", *WATCHED_SETTINGS, program=program)
    changed: dict[str, Any] = {"__name__": "watched"}
    exec(WATCHED, changed)
    for name, value in changed["constants"].items():
        monkeypatch.setattr(spikes, name, value)
    monkeypatch.setattr(Trainer, "_read", changed["spoiled"])
    config = load_config(repo / "configs" / "tiny.yaml", [*SETTINGS, *WATCHED_SETTINGS])
    train(config, tmp_path / "one", data=groups_of_text)
    ours, theirs = records(two), records(tmp_path / "one")
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    assert [record for record in ours if "spike_step" in record] == [
        {"step": HALF, "spike_step": 10, "rollbacks": 1, "skipped_batches": 4 + 2}
    ]
    for a, b in zip(ours, theirs, strict=True):
        for key in a.keys() & {"loss", "norm", "valid_bpb", "valid_bpb_by_group"}:
            assert a[key] == pytest.approx(b[key], rel=OF_MUON)
    assert sum(len(record.get("valid_bpb_by_group", ())) for record in ours) == 2 * 3
    half = str(two / "checkpoints" / f"step-{HALF:08d}")
    resumed = two_ranks(repo, tmp_path / "again", groups_of_text, half, *WATCHED_SETTINGS, program=program)
    assert records(resumed) == [record for record in ours if record["step"] > HALF]
    found, expected = (models.load(out).require_blt()[0].state_dict() for out in (resumed, two))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_ranks_without_torchrun_are_refused(
    repo: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"RANK, LOCAL_RANK.* torchrun"):
        train(config_of(repo), tmp_path / "run", data=data)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UsageError, match="WORLD_SIZE is 'two'"):
        train(config_of(repo), tmp_path / "run", data=data)


def test_flex_attention_with_several_ranks_is_refused(
    repo: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "processes", lambda device: nullcontext((parallel.Ranks(0, 2), device)))
    config = load_config(repo / "configs" / "tiny.yaml", [*SETTINGS, "run.attention=flex", "run.compile=true"])
    with pytest.raises(ConfigError, match="a single process"):
        train(config, tmp_path / "run", data=data)


@pytest.mark.parametrize(
    ("rows", "micro", "world", "expected"),
    [(8, None, 1, 8), (8, None, 2, 4), (8, 2, 2, 2), (8, 16, 4, 2), (4, 4, 4, 1)],
)
def test_rows_are_divided(rows: int, micro: int | None, world: int, expected: int) -> None:
    assert parallel.check_rows(rows, micro, world) == expected


@pytest.mark.parametrize(
    ("rows", "buckets", "world", "expected"),
    [(8, 1, 1, 8), (8, 2, 1, 4), (8, 3, 1, 2), (8, 8, 1, 1), (4, 8, 1, 1), (8, 2, 2, 4), (8, 2, 4, 2), (12, 5, 2, 2)],
)
def test_by_default_a_batch_has_a_micro_batch_for_each_length(
    rows: int, buckets: int, world: int, expected: int
) -> None:
    assert parallel.check_rows(rows, None, world, buckets) == expected


@pytest.mark.parametrize(("rows", "micro", "world"), [(8, None, 3), (8, 3, 2), (2, None, 4)])
def test_rows_that_do_not_divide(rows: int, micro: int | None, world: int) -> None:
    with pytest.raises(ConfigError, match=f"batch.rows {rows} cannot be divided"):
        parallel.check_rows(rows, micro, world)
