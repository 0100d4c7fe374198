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
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
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
from blt.train import checkpoints, parallel, resume, spikes
from blt.train.averages import Averages
from blt.train.background import BackgroundWriter
from blt.train.checkpoints import TrainingCheckpoint
from blt.train.config import RunConfig
from blt.train.dryrun import FORWARD_PASSES_PER_STEP
from blt.train.metrics import GroupSums, MetricsFile, MetricWindow
from blt.train.norms import PartNorms
from blt.train.objective import Diverged, Objective
from blt.train.optim import gradient_norm, learning_rate, make_optimizer, scale_gradients
from blt.train.parallel import Ranks
from blt.train.profile import BACKWARD, DATA, FORWARD, OPTIMIZER, StepProfile
from blt.train.progress import Observer, observing
from blt.train.recompute import undo_recompute
from blt.train.speed import Speed
from blt.train.spikes import LossSpike
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
        if config.optimizer.ema is not None:
            self.state.averages = Averages(model, config.optimizer.ema)
        self.state.spikes.most = config.run.spike_rollback
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
        self.background = BackgroundWriter(ranks) if config.run.async_checkpoints else None
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

    def _averaged(self) -> AbstractContextManager[None]:
        """The model has the averages of its weights while inside, if the run keeps them. Every rank calls it."""
        return nullcontext() if self.state.averages is None else self.state.averages.applied()

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
        written = nullcontext() if self.background is None else closing(self.background)
        with (
            kernels,
            _ignored_warnings(),
            self._signals(),
            closing(state.loader),
            written,
            observing_run as self.observer,
        ):
            self.metrics.on_record = self.observer.record
            if state.step == 0:
                self.log_sample()
            self._save_rollback_target()
            state.window.start()
            while state.step < steps:
                try:
                    with self.profile.step(state.step + 1, self.objective):
                        self._step_or_stop()
                except LossSpike as spike:
                    self._roll_back(spike)
                    if self._must_stop:
                        raise self._terminated() from None
                    continue
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

        A spike of the loss changes nothing and raises LossSpike, if `run.spike_rollback` allows to go back.
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
        loss = nats / max(1, batch.n_targets)
        self._check_spike(loss, norm_now, batch)
        if self._is_finite(nats, norm_now, batch):
            averaging = nullcontext() if state.averages is None else state.averages.following()
            with record_function(OPTIMIZER), self.norms.measured(state.step + 1), averaging:
                scale_gradients([*gradients, *rows], norm, self.config.optimizer.clip)
                state.optimizer.step()
                if tables is not None:
                    tables.step(rows[0], lr)
            state.bytes += batch.n_bytes
            state.window.add(nats, batch)
            self.observer.step(state.step + 1, nats, batch)
            state.lr, state.norm = lr, norm_now
            state.spikes.add(loss)
        else:
            state.window.skip()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        return loss

    def _backward(self, batch: Batch) -> Tensor:
        """Adds up the gradients of the mean loss over the global batch, in micro-batches.

        Returns the summed nats of this rank's rows, float64 on the device: nothing waits for it here.
        """
        targets = max(1, batch.n_targets)
        nats = torch.zeros((), dtype=torch.float64, device=self.objective.device)
        for row, part in self._micro_batches(batch):
            self._announce_compilation(part)
            with record_function(FORWARD):
                total, _ = self._losses(row, part)
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
        nats, signals, norm_now = self.ranks.sum(nats, float(self._signal != 0), norm_now if self.ranks.first else 0.0)
        self._any_rank_signalled = signals > 0
        return nats, norm_now

    def _check_spike(self, loss: float, norm: float, batch: Batch) -> None:
        """Raises LossSpike if this step is a spike and an older checkpoint is there, and Diverged if the run went back
        as often as it may. The step has changed nothing then."""
        state, every = self.state, self.config.run.checkpoint_every
        found = state.spikes.found(loss, norm)
        if not found:
            return
        if self.background is not None:
            self.background.wait()  # its checkpoint may be the one to return to
        where = f"{found} at step {state.step + 1}, {batch.identity}"
        steps = self.ranks.on_first(lambda: [*map(checkpoints.step_of, checkpoints.checkpoint_folders(self.folder))])
        if not any(state.spikes.is_target(step, state.step, every) for step in steps):
            log.warning("%s; no checkpoint is %d steps older, so training goes on", where, spikes.BACK)
            return
        state.optimizer.zero_grad(set_to_none=True)
        if state.spikes.rollbacks >= state.spikes.most:
            raise Diverged(
                f"{where}: a spike after {state.spikes.rollbacks} rollbacks, as many as run.spike_rollback allows; "
                "this step changed nothing: resume with a lower optimizer.lr or a longer schedule.warmup"
            )
        raise LossSpike(where)

    def _roll_back(self, spike: LossSpike) -> None:
        """Returns to the newest checkpoint that is old enough and goes on after the batches that led to a spike.

        The checkpoint is written again with the new place in the text, so a run that is killed does not come back to
        these batches.
        """
        state, at = self.state, self.state.step
        is_target = partial(state.spikes.is_target, at=at, every=self.config.run.checkpoint_every)
        after, counted = state.loader.state(), state.spikes.state()
        checkpoint = self.ranks.on_first(lambda: checkpoints.read_newest(self.folder, is_target))
        assert checkpoint is not None
        state.load_state_dict(checkpoint.state, partial(checkpoint.load, ranks=self.ranks))
        with state.window.paused():
            state.loader.restore(after)
            for _ in range(spikes.SKIP):
                next(state.loader)
            batches = at - state.step + 1 + spikes.SKIP
            state.spikes.restore({**counted, "losses": state.spikes.losses})
            state.spikes.roll_back(state.step, batches)
            log.warning("%s; back to step %s, skipping %d batches", spike, f"{state.step:,}", batches)
            event = {"step": state.step, "spike_step": at + 1, "rollbacks": state.spikes.rollbacks}
            event["skipped_batches"] = batches
            self.metrics.return_to(state.step, event)
            self.ranks.on_first(lambda: checkpoints.set_aside(self.folder, state.step))
            self._saved_step = -1
            self.save()

    def _save_rollback_target(self) -> None:
        """The first checkpoint of a run that may have to go back: that of step 0, or of the step where it continues
        another run."""
        run, step = self.config.run, self.state.step
        if not run.spike_rollback or step % run.checkpoint_every:
            return
        steps = self.ranks.on_first(lambda: [*map(checkpoints.step_of, checkpoints.checkpoint_folders(self.folder))])
        if step not in steps:
            self._saved_step = -1
            self.save()

    def _announce_compilation(self, batch: Batch) -> None:
        if self.objective.must_compile(batch):
            log.info("compiling the training step for rows of %s ...", f"{batch.ids.shape[1]:,}")
            self._at_once = self.ranks.single

    def _micro_batches(self, batch: Batch) -> list[tuple[int, Batch]]:
        """This rank's micro-batches, each with its first row among those of this rank."""
        if self.state.tables is not None:
            self.state.tables.gather(batch)
        return [(i * self.micro_rows, part) for i, part in enumerate(batch.micro_batches())]

    def _losses(self, row: int, part: Batch) -> tuple[Tensor, Tensor]:
        """The summed nats of a micro-batch that begins at this row of this rank's, and those of each target."""
        if self.state.tables is not None:
            self.state.tables.select_rows(row, row + self.micro_rows, part.ids.shape[1])
        return self.objective(part)

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
            with self._averaged():
                text = self.sample().decode("utf-8", "replace")
            log.info("sample at step %s: %r", f"{self.state.step:,}", text)

    def spent(self) -> dict[str, float]:
        """Bytes trained on so far, and the FLOPs spent on them."""
        n_bytes = self.state.bytes
        return {"bytes": n_bytes, "flops": FORWARD_PASSES_PER_STEP * self.flops_per_byte * n_bytes}

    def validate(self) -> dict[str, Any]:
        """Bits per byte of the validation loader's text, and of each of its groups if there are several; every target
        counts, EOS included."""
        assert self.valid is not None
        window, loader = MetricWindow(), self.valid().shared(self._share)
        assert loader.groups is not None
        by_group = GroupSums(loader.groups, loader.documents.token_bytes, self.objective.device)
        # One rank keeps gradients on: the compiled step then serves training and validation without a second graph.
        with torch.set_grad_enabled(self.ranks.single), self._averaged():
            for batch in loader.one_pass():
                batch = replace(batch, micro_rows=self.micro_rows)
                totals = []
                for row, part in self._micro_batches(batch):
                    total, each = self._losses(row, part)
                    totals.append(total.detach())
                    by_group.add(part, self.objective.tensor(part.target_groups), each)
                window.add(self.ranks.sum(torch.stack(totals).double().sum().item())[0], batch)
        bits = by_group.bits_per_byte(self.ranks)
        found = {"valid_bpb": window.summary()["bpb"], "valid_bytes": window.bytes}
        if self.state.averages is not None:
            found["valid_weights"] = "ema"
        return found | ({"valid_bpb_by_group": bits} if len(bits) > 1 else {})

    def save(self) -> None:
        """Writes the checkpoint of this step, once. Every rank calls it.

        Raises CheckpointError if it cannot be written; older ones are intact then. With `run.async_checkpoints` it only
        begins, and the error is that of the checkpoint before.
        """
        if self._saved_step == self.state.step:
            return
        tensors, values = self.state.state_dict()
        values |= {"config": self.config.model_dump(mode="json"), "extra": self.extra}
        write = checkpoints.write if self.background is None else self.background.write
        needed = partial(self.state.spikes.is_needed, at=self.state.step, every=self.config.run.checkpoint_every)
        write(
            self.folder, self.state.step, tensors, values,
            keep=self.config.run.keep_checkpoints, milestone=self._is_milestone, needed=needed, ranks=self.ranks,
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
        """After the last step: the weights are final, or their averages if the run keeps them, and no activation
        checkpointing is left in the model."""
        if self.state.tables is not None:
            self.state.tables.catch_up_all()
        if self.state.averages is not None:
            self.state.averages.apply()
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
    """Hides torch's warning about float32 norm weights in a bfloat16 step: they are float32 on purpose. And that of DCP
    that one rank has no process group, which a background thread would print."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
