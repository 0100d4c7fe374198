"""The training loop of the entropy model and the BLT.

A run can be stopped at any step and resumed bit for bit: the snapshot holds the model, the optimizer, the step, the
loader's place and the random state, and everything else follows from the configuration. `deterministic` keeps
gradients independent of thread timing (torch's compiled scatter uses atomic additions otherwise).
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic

from blt.data.packing import Batch, Loader
from blt.train import parallel, restart
from blt.train.config import RunConfig
from blt.train.dryrun import TRAINING
from blt.train.metrics import MetricsFile, Window
from blt.train.objective import Diverged, Objective
from blt.train.optim import gradient_norm, learning_rate, make_optimizer, scale_gradients
from blt.train.parallel import Ranks, accumulating
from blt.train.recompute import compute_once, recompute_blocks
from blt.train.snapshots import Snapshot
from blt.train.tables import sparse_tables
from blt.train.watch import Watch, watching
from blt_runtime.errors import BltError

log = logging.getLogger("blt.train")

SKIPS = 10
"""Steps in a row that `run.on_nonfinite: skip` skips; one more stops the run: its weights are lost."""


class Terminated(BltError):
    """The run was told to stop, and saved its state first."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by signal {signal_number} after step {step}; --resume auto goes on from there")
        self.exit_code = 128 + signal_number


class Trainer:
    """One run in the folder `out`. `valid` makes a fresh loader over the validation text, or is None."""

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        loader: Loader,
        valid: Callable[[], Loader] | None,
        out: Path,
        extra: dict[str, Any] | None = None,
        flops_per_byte: float = 0.0,
    ):
        self.config, self.objective, self.loader, self.valid, self.out = config, objective, loader, valid, out
        self.ranks = parallel.ONE
        self.micro_rows = parallel.check_rows(config.batch.rows, config.batch.micro_rows, 1)
        if config.run.activation_checkpointing:
            recompute_blocks(objective.model)
        self.tables = sparse_tables(objective.model, config.optimizer)
        self.optimizer = make_optimizer(objective.model, config.optimizer)
        self.metrics = MetricsFile(out / "metrics.jsonl")
        self.window, self.watch = Window(), Watch()
        self.extra = extra or {}
        self.flops_per_byte = flops_per_byte
        self.step = self.bytes = self.skips = 0
        self.lr = self.norm = 0.0
        self._saved = -1
        self._signal = 0
        self._told = False

    @property
    def folder(self) -> Path:
        return self.out / "checkpoints"

    def share_out(self, ranks: Ranks, compile: bool = False) -> None:
        """This trainer becomes one of several, before its first step. Every rank calls it.

        compile: the blocks, each for itself; FSDP gathers between them, so the step cannot be one graph.
        """
        if ranks.alone:
            return
        self.ranks, self.metrics.writes = ranks, ranks.first
        self.micro_rows = parallel.check_rows(self.config.batch.rows, self.config.batch.micro_rows, ranks.world)
        apart = [] if self.tables is None else [self.tables.weight_RD]
        parallel.shard(self.objective.model, ranks, self.objective.device, compile, apart)
        self.optimizer = make_optimizer(self.objective.model, self.config.optimizer)

    def run(self, steps: int) -> None:
        """Trains up to `steps` in all. Raises Terminated after SIGTERM or Ctrl-C, with everything saved."""
        run = self.config.run
        self.out.mkdir(parents=True, exist_ok=True)
        watch = watching(self.out, steps, self.step, run.tensorboard)
        kernels = _determinism(run.deterministic)
        with kernels, _known_warnings(), self._signals(), closing(self.loader), watch as self.watch:
            self.metrics.watch = self.watch.record
            self.window.start()
            while self.step < steps:
                self.train_step()
                last = self.step == steps
                if self.step % run.log_every == 0 or last:
                    self.log()
                if self.valid is not None and (self.step % run.valid_every == 0 or last):
                    with self.window.paused():
                        self.metrics.write({"step": self.step, **self.spent(), **self.validate()})
                if self.step % run.checkpoint_every == 0 or last or self._stop:
                    with self.window.paused():
                        self.save()
                if self._stop:
                    raise Terminated(self._signal or signal.SIGTERM, self.step)

    def train_step(self) -> float:
        """One step over a global batch; returns its loss in nats per target.

        Raises Diverged if the loss or the gradient is not finite: weights and step are those before. With
        `run.on_nonfinite: skip` such a batch is passed over instead and the step counted.
        """
        batch = next(self.loader)
        lr = learning_rate(self.step, self.config.optimizer.lr, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        nats = self._backward(batch)
        gradients = [p.grad for p in self.objective.model.parameters() if p.grad is not None]
        if self.tables is not None:
            gradients.append(self.tables.reduce(self.ranks))
        norm = gradient_norm(gradients)
        finite = self._is_finite(nats, norm.item(), batch)
        if finite:
            scale_gradients(gradients, norm, self.config.optimizer.clip)
            self.optimizer.step()
            if self.tables is not None:
                self.tables.step(gradients[-1], lr)
            self.bytes += batch.n_bytes
            self.window.add(nats, batch)
            self.watch.step(self.step + 1, nats, batch)
            self.lr, self.norm = lr, norm.item()
        else:
            self.window.skip()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return nats / max(1, batch.n_targets)

    def _backward(self, batch: Batch) -> float:
        """Adds the gradients of the mean loss over the global batch, in micro-batches; returns its sum in nats."""
        model, targets, nats = self.objective.model, max(1, batch.n_targets), 0.0
        parts = self._parts(batch)
        for i, part in enumerate(parts):
            with accumulating(model, last=i == len(parts) - 1):
                total = part()
                (total / targets).backward()
            nats += total.item()
        nats, told = self.ranks.sum(nats, float(self._signal != 0))
        self._told = told > 0
        return nats

    def _parts(self, batch: Batch) -> list[Callable[[], Tensor]]:
        """This rank's rows in micro-batches: each, when called, computes its sum of nats."""
        if self.tables is not None:
            self.tables.begin(batch)
        first, stop = self.ranks.rows(len(batch.starts))
        return [partial(self._loss, batch, row) for row in range(first, stop, self.micro_rows)]

    def _loss(self, batch: Batch, row: int) -> Tensor:
        if self.tables is not None:
            self.tables.place(row, row + self.micro_rows)
        return self.objective(batch.rows(row, row + self.micro_rows))[0]

    def _is_finite(self, nats: float, norm: float, batch: Batch) -> bool:
        """Whether the step can be taken. Raises Diverged, without gradients left, if it stops the run."""
        if math.isfinite(nats) and math.isfinite(norm):
            self.skips = 0
            return True
        self.skips += 1
        what = "the gradient norm" if math.isfinite(nats) else "the loss"
        value = norm if math.isfinite(nats) else nats
        where = f"{what} is {value} at step {self.step}, {batch.identity}"
        if self.config.run.on_nonfinite == "stop" or self.skips > SKIPS:
            self.optimizer.zero_grad(set_to_none=True)
            often = f" ({self.skips} steps in a row)" if self.skips > 1 else ""
            raise Diverged(
                f"{where}{often}; nothing of this step was kept: resume with a lower optimizer.lr, "
                "a longer schedule.warmup or run.dtype=fp32"
            )
        log.warning("%s; skipped", where)
        return False

    def log(self) -> None:
        """One line of metrics.jsonl over the steps since the last one; rate and norm are the last step's."""
        last = {"lr": self.lr, "norm": self.norm} if self.window.buckets else {}
        record = {"step": self.step, **self.window.summary(), **last, **self.spent()}
        self.metrics.write({**record, "seconds": self.window.all_seconds})
        self.window.reset()

    def spent(self) -> dict[str, float]:
        """Bytes trained on so far, and the FLOPs of that: forward once and backward twice."""
        return {"bytes": self.bytes, "flops": TRAINING * self.flops_per_byte * self.bytes}

    def validate(self) -> dict[str, float]:
        """Bits per byte on the validation text, every target (also EOS) counted, up to `data.valid_bytes`."""
        assert self.valid is not None
        window = Window()
        # One rank keeps gradients on: the compiled step serves both, a second one would cost a compilation.
        with torch.set_grad_enabled(self.ranks.alone):
            for batch in self.valid().one_pass():
                nats = sum(part().item() for part in self._parts(batch))
                window.add(self.ranks.sum(nats)[0], batch)
                if window.bytes >= self.config.data.valid_bytes:
                    break
        return {"valid_bpb": window.summary()["bpb"], "valid_bytes": window.bytes}

    def save(self) -> None:
        """Writes the snapshot of this step, once. Raises CheckpointError, with older ones intact."""
        if self._saved != self.step:
            restart.save(self)
            self._saved = self.step

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on from a snapshot. Raises CheckpointError if its model, data or batch shape is another one."""
        restart.restore(self, snapshot)
        self._saved = self.step

    def finish(self) -> None:
        """After the last step: the model is whole on every rank, and computes as if nobody had trained it."""
        if self.tables is not None:
            self.tables.settle()
        compute_once(self.objective.model)
        parallel.make_whole(self.objective.model)

    @property
    def _stop(self) -> bool:
        """A signal came; with several ranks, to any of them before the last step's sums."""
        return self._signal != 0 if self.ranks.alone else self._told

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """While running, SIGTERM and Ctrl-C end the run after the step that they fall into."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(number: int, frame: FrameType | None) -> None:
            self._signal = number

        old = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Deterministic kernels while inside, without that mode's filling of fresh memory (it costs time alone)."""
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = deterministic  # a property that the type stubs do not know
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(wanted)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fill


@contextmanager
def _known_warnings() -> Iterator[None]:
    """Without torch's remark on norms with float32 weights in a bfloat16 step: the weights are float32 on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield
