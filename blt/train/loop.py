"""The training loop of the entropy model, the BLT and the token model.

A run can be stopped at any step and resumed bit for bit: a checkpoint holds the run's `TrainState`, and everything else
follows from the configuration. `run.deterministic` makes gradients independent of thread timing (torch's compiled
scatter uses atomic additions otherwise).
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils import deterministic

from blt.data.batches import Batch, Share
from blt.data.packing import Loader
from blt.train import checkpoints, parallel, resume
from blt.train.checkpoints import TrainingCheckpoint
from blt.train.config import RunConfig
from blt.train.dryrun import FORWARD_PASSES_PER_STEP
from blt.train.metrics import MetricsFile, MetricWindow
from blt.train.norms import PartNorms
from blt.train.objective import Diverged, Objective
from blt.train.optim import gradient_norm, learning_rate, make_optimizer, scale_gradients
from blt.train.parallel import Ranks
from blt.train.profile import BACKWARD, DATA, FORWARD, OPTIMIZER, StepProfile
from blt.train.progress import Observer, observing
from blt.train.recompute import undo_recompute
from blt.train.speed import Speed
from blt.train.state import TrainState
from blt.train.tables import sparse_tables
from blt_runtime.errors import BltError

log = logging.getLogger("blt.train")

MAX_SKIPPED_STEPS = 10
"""Steps in a row that `run.on_nonfinite: skip` skips. One more stops the run: its weights are lost."""


class Terminated(BltError):
    """The run was stopped by a signal, after its state was saved."""

    def __init__(self, signal_number: int, step: int, advice: str):
        how = "interrupted" if signal_number == signal.SIGINT else f"stopped by {signal.Signals(signal_number).name}"
        super().__init__(f"{how}, saved at step {step:,}; {advice}")
        self.exit_code = 128 + signal_number


class _StoppedAtOnce(BaseException):
    """Raised by the signal handler while a step compiles or waits for data, which may take minutes. No error, so that
    torch lets it pass."""


class Trainer:
    """One run in the folder `out`.

    valid: makes a fresh loader over the validation text; None without one.  extra: plain values that a resumed run must
    share.  flops_per_byte: of a forward pass, for the metrics.  model_flops_per_byte: of the trained model alone.
    sample: writes a text with the model, for `run.sample_every`.  ranks: the processes that its model is sharded over.
    """

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        loader: Loader,
        valid: Callable[[], Loader] | None,
        out: Path,
        *,
        ranks: Ranks = parallel.SINGLE,
        extra: dict[str, Any] | None = None,
        flops_per_byte: float = 0.0,
        model_flops_per_byte: float = 0.0,
        sample: Callable[[], bytes] | None = None,
    ):
        self.config, self.objective, self.valid, self.out = config, objective, valid, out
        self.ranks = ranks
        self.micro_rows = parallel.micro_rows(config.batch, ranks.world)
        model = objective.model
        tables = sparse_tables(model, config.optimizer, ranks)
        self.state = TrainState(model, optimizer=make_optimizer(model, config.optimizer), tables=tables, loader=loader)
        if not ranks.single:
            loader.shared(self._share)
        self.metrics = MetricsFile(out / "metrics.jsonl")
        self.metrics.writes = ranks.first
        self.observer = Observer()
        self.extra = extra or {}
        self.flops_per_byte = flops_per_byte
        self.speed = Speed.of(config.run, objective.device, model_flops_per_byte)
        self.norms = PartNorms(
            model, "token model" if config.kind == "bpe" else "entropy model", config.run.norms_every
        )
        self.sample = sample
        self.profile = StepProfile()
        self.advice = "run the same command to continue"
        """What to do after a signal, for its message."""
        self._saved_step = -1
        self._at_once = False
        self._signal = 0
        self._any_rank_signalled = False

    @property
    def folder(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.out / checkpoints.FOLDER

    @property
    def _share(self) -> Share:
        """What this rank reads of a batch."""
        return Share(self.ranks.rank, self.ranks.world, self.micro_rows)

    def run(self, steps: int) -> None:
        """Trains until step `steps`. Raises Terminated after SIGTERM or Ctrl-C, with everything saved."""
        run, state = self.config.run, self.state
        self.out.mkdir(parents=True, exist_ok=True)
        observing_run = observing(self.out, steps, at=state.step, tensorboard=run.tensorboard)
        kernels = _determinism(run.deterministic)
        with kernels, _ignored_warnings(), self._signals(), closing(state.loader), observing_run as self.observer:
            self.metrics.on_record = self.observer.record
            if state.step == 0:
                self.log_sample()
            state.window.start()
            while state.step < steps:
                with self.profile.step(state.step + 1, self.objective):
                    self._step_or_stop()
                last = state.step == steps
                if norms := self.norms.take():
                    self.metrics.write({"step": state.step, **norms})
                if state.step % run.log_every == 0 or last:
                    self.log()
                if self.valid is not None and (state.step % run.valid_every == 0 or last):
                    with state.window.paused():
                        self.metrics.write({"step": state.step, **self.spent(), **self.validate()})
                if run.sample_every and (state.step % run.sample_every == 0 or last):
                    with state.window.paused():
                        self.log_sample()
                if state.step % run.checkpoint_every == 0 or self._is_milestone or last or self._must_stop:
                    with state.window.paused():
                        self.save()
                if self._must_stop and not last:
                    raise self._terminated()

    def _step_or_stop(self) -> None:
        """One step. A signal while it compiles or waits for data ends the run at once, in the state before the step."""
        position = self.state.loader.state()
        try:
            self.train_step()
        except BaseException:  # also the error of a compiler that the terminal's Ctrl-C killed
            if not (self._signal and self._at_once):
                raise
            self.state.loader.restore(position)
            self.state.optimizer.zero_grad(set_to_none=True)
            self.save()
            raise self._terminated() from None

    def _terminated(self) -> Terminated:
        return Terminated(self._signal or signal.SIGTERM, self.state.step, self.advice)

    def train_step(self) -> float:
        """One step over a global batch; returns its loss in nats per target.

        If the loss or the gradient is not finite, weights and step stay as they were and Diverged is raised. With
        `run.on_nonfinite: skip` the batch is skipped instead, and the step is counted.
        """
        state, tables = self.state, self.state.tables
        self._at_once = self.ranks.single
        with record_function(DATA), state.window.waiting():
            batch = replace(next(state.loader), micro_rows=self.micro_rows)
        self._at_once = False
        lr = learning_rate(state.step, self.config.optimizer.lr, self.config.schedule)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        total = self._backward(batch)
        gradients = [p.grad for p in self.objective.model.parameters() if p.grad is not None]
        rows = [] if tables is None else [tables.reduce()]
        norm = gradient_norm(gradients, rows, parallel.SINGLE if tables is None else tables.owners)
        nats, norm_now = self._read(total, norm)
        if self._is_finite(nats, norm_now, batch):
            with record_function(OPTIMIZER), self.norms.measured(state.step + 1):
                scale_gradients([*gradients, *rows], norm, self.config.optimizer.clip)
                state.optimizer.step()
                if tables is not None:
                    tables.step(rows[0], lr)
            state.bytes += batch.n_bytes
            state.window.add(nats, batch)
            self.observer.step(state.step + 1, nats, batch)
            state.lr, state.norm = lr, norm_now
        else:
            state.window.skip()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        return nats / max(1, batch.n_targets)

    def _backward(self, batch: Batch) -> Tensor:
        """Adds up the gradients of the mean loss over the global batch, in micro-batches.

        Returns the summed nats of this rank's rows, float64 on the device: nothing waits for it here.
        """
        targets = max(1, batch.n_targets)
        nats = torch.zeros((), dtype=torch.float64, device=self.objective.device)
        for row, part in self._micro_batches(batch):
            self._announce_compilation(part)
            with record_function(FORWARD):
                total = self._loss(row, part)
            with record_function(BACKWARD):
                (total / targets).backward()
            nats += total.detach()
        self._at_once = False
        return nats

    def _read(self, total: Tensor, norm: Tensor) -> tuple[float, float]:
        """The nats of all ranks' rows and the gradient norm as numbers: the one time that a step waits for the device.

        Sparse tables wait for the number of rows that the batch touches, and sharded ones for those of other ranks.
        """
        nats, norm_now = torch.stack((total, norm.to(total))).tolist()
        nats, signals = self.ranks.sum(nats, float(self._signal != 0))
        self._any_rank_signalled = signals > 0
        return nats, norm_now

    def _announce_compilation(self, batch: Batch) -> None:
        if self.objective.must_compile(batch):
            log.info("compiling the training step for rows of %s ...", f"{batch.ids.shape[1]:,}")
            self._at_once = self.ranks.single

    def _micro_batches(self, batch: Batch) -> list[tuple[int, Batch]]:
        """This rank's micro-batches, each with its first row among those of this rank."""
        if self.state.tables is not None:
            self.state.tables.gather(batch)
        return [(i * self.micro_rows, part) for i, part in enumerate(batch.micro_batches())]

    def _loss(self, row: int, part: Batch) -> Tensor:
        """The summed nats of a micro-batch that begins at this row of this rank's."""
        if self.state.tables is not None:
            self.state.tables.select_rows(row, row + self.micro_rows, part.ids.shape[1])
        return self.objective(part)[0]

    def _is_finite(self, nats: float, norm: float, batch: Batch) -> bool:
        """Whether the step can be taken. If it stops the run, raises Diverged after the gradients are cleared."""
        state = self.state
        if math.isfinite(nats) and math.isfinite(norm):
            state.skips = 0
            return True
        state.skips += 1
        name, value = ("the gradient norm", norm) if math.isfinite(nats) else ("the loss", nats)
        where = f"{name} is {value} at step {state.step}, {batch.identity}"
        if self.config.run.on_nonfinite == "stop" or state.skips > MAX_SKIPPED_STEPS:
            state.optimizer.zero_grad(set_to_none=True)
            in_a_row = f" ({state.skips} steps in a row)" if state.skips > 1 else ""
            raise Diverged(
                f"{where}{in_a_row}; this step changed nothing: resume with a lower optimizer.lr, "
                "a longer schedule.warmup or run.dtype=fp32"
            )
        log.warning("%s; skipped", where)
        return False

    def log(self) -> None:
        """Writes one line of metrics.jsonl about the steps since the last one; `lr` and `norm` are the last step's."""
        state, window = self.state, self.state.window
        record = {"step": state.step, **window.summary()}
        if window.buckets:
            record |= {
                "lr": state.lr,
                "norm": state.norm,
                **self.speed.record(window, record["bytes_per_s"], self.ranks),
            }
        self.metrics.write({**record, **self.spent(), "seconds": window.all_seconds})
        window.reset()

    def log_sample(self) -> None:
        """Logs a text that the model writes, if the run wants samples. Several ranks log none: each has a shard."""
        if self.sample is None or not self.config.run.sample_every or not self.ranks.single:
            return
        if log.isEnabledFor(logging.INFO):
            if self.state.tables is not None:
                self.state.tables.forget_batch()
            text = self.sample().decode("utf-8", "replace")
            log.info("sample at step %s: %r", f"{self.state.step:,}", text)

    def spent(self) -> dict[str, float]:
        """Bytes trained on so far, and the FLOPs spent on them."""
        n_bytes = self.state.bytes
        return {"bytes": n_bytes, "flops": FORWARD_PASSES_PER_STEP * self.flops_per_byte * n_bytes}

    def validate(self) -> dict[str, float]:
        """Bits per byte of the validation loader's text; every target counts, EOS included."""
        assert self.valid is not None
        window = MetricWindow()
        # One rank keeps gradients on: the compiled step then serves training and validation without a second graph.
        with torch.set_grad_enabled(self.ranks.single):
            for batch in self.valid().shared(self._share).one_pass():
                batch = replace(batch, micro_rows=self.micro_rows)
                losses = [self._loss(*part).detach() for part in self._micro_batches(batch)]
                window.add(self.ranks.sum(torch.stack(losses).double().sum().item())[0], batch)
        return {"valid_bpb": window.summary()["bpb"], "valid_bytes": window.bytes}

    def save(self) -> None:
        """Writes the checkpoint of this step, once. Every rank calls it.

        Raises CheckpointError if it cannot be written; older ones are intact then.
        """
        if self._saved_step == self.state.step:
            return
        tensors, values = self.state.state_dict()
        values |= {"config": self.config.model_dump(mode="json"), "extra": self.extra}
        checkpoints.write(
            self.folder, self.state.step, tensors, values,
            keep=self.config.run.keep_checkpoints, milestone=self._is_milestone, ranks=self.ranks,
        )  # fmt: skip
        self._saved_step = self.state.step

    @property
    def _is_milestone(self) -> bool:
        """Whether the checkpoint of this step is kept for ever."""
        every, step = self.config.run.milestones_every, self.state.step
        return every > 0 and step > 0 and step % every == 0

    def restore(self, checkpoint: TrainingCheckpoint) -> None:
        """Continues from a checkpoint. Raises CheckpointError if its model, data or batch shape differs."""
        resume.check_same_run(checkpoint, self.config, self.extra)
        try:
            self.state.load_state_dict(checkpoint.state, partial(checkpoint.load, ranks=self.ranks))
        except (LookupError, TypeError, ValueError) as error:
            raise checkpoint.incomplete(error) from None
        self._saved_step = self.state.step

    def finish(self) -> None:
        """After the last step: the weights are final, and no activation checkpointing is left in the model."""
        if self.state.tables is not None:
            self.state.tables.catch_up_all()
        undo_recompute(self.objective.model)

    @property
    def _must_stop(self) -> bool:
        """A signal arrived: with several ranks, at any of them before the last step's sums."""
        return self._signal != 0 if self.ranks.single else self._any_rank_signalled

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """While inside, SIGTERM and Ctrl-C end the run after the current step, or at once while the step compiles or
        waits for data."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(number: int, frame: FrameType | None) -> None:
            self._signal = number
            if self._at_once:
                raise _StoppedAtOnce

        old = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


@contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Deterministic kernels while inside. Fresh memory is not filled, which that mode does by default: it costs time
    and changes no result."""
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = deterministic  # the type stubs lack this property
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(wanted)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fill


@contextmanager
def _ignored_warnings() -> Iterator[None]:
    """Hides torch's warning about float32 norm weights in a bfloat16 step: they are float32 on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        yield
