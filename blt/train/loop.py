"""The training loop of the entropy model and the BLT.

A run can be stopped at any step and resumed bit for bit: the snapshot holds the model, the optimizer, the step, the
loader's place and the random state, and everything else follows from the configuration. `deterministic` keeps
gradients independent of thread timing (torch's compiled scatter uses atomic additions otherwise).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils import deterministic

from blt.config import RunConfig
from blt.data.packing import Loader
from blt.train import snapshots
from blt.train.dryrun import TRAINING
from blt.train.metrics import MetricsFile, Window
from blt.train.objective import Objective, check_finite
from blt.train.optim import learning_rate, make_optimizer
from blt_runtime.errors import BltError, CheckpointError

# Sections of the configuration (or keys of one) that a resumed run shares with the checkpoint.
SAME: dict[str, tuple[str, ...]] = {
    "kind": (),
    "model": (),
    "batch": (),
    "patching": (),
    "tokenizer": (),
    "data": ("groups",),
    "optimizer": ("freeze", "lr_scale"),
    "run": ("seed", "dtype"),
}


class Terminated(BltError):
    """The run was told to stop, and saved its state first."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(f"stopped by signal {signal_number} after step {step}; the same command resumes")
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
        self.optimizer = make_optimizer(objective.model, config.optimizer)
        self.metrics = MetricsFile(out / "metrics.jsonl")
        self.window = Window()
        self.extra = extra or {}
        self.flops_per_byte = flops_per_byte
        self.step = self.bytes = 0
        self._saved = -1
        self._signal = 0

    @property
    def folder(self) -> Path:
        return self.out / "checkpoints"

    def run(self, steps: int) -> None:
        """Trains up to `steps` in all. Raises Terminated after SIGTERM or Ctrl-C, with everything saved."""
        run = self.config.run
        self.out.mkdir(parents=True, exist_ok=True)
        with _determinism(run.deterministic), self._signals():
            self.window.start()
            while self.step < steps:
                self.train_step()
                last = self.step == steps
                if self.step % run.log_every == 0 or last:
                    self.log()
                if self.valid is not None and (self.step % run.valid_every == 0 or last):
                    with self.window.paused():
                        self.metrics.write({"step": self.step, **self.spent(), **self.validate()})
                if self.step % run.checkpoint_every == 0 or last or self._signal:
                    with self.window.paused():
                        self.save()
                if self._signal:
                    raise Terminated(self._signal, self.step)

    def train_step(self) -> float:
        """One step; returns the loss in nats per target."""
        batch = next(self.loader)
        lr = learning_rate(self.step, self.config.optimizer.lr, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        total, targets = self.objective(batch)
        nats = total.item()
        check_finite(nats, "the loss", self.step)
        (total / targets).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.objective.model.parameters(), self.config.optimizer.clip)
        check_finite(norm.item(), "the gradient norm", self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.bytes += batch.n_bytes
        self.window.add(nats, batch)
        self.lr, self.norm = lr, norm.item()
        return nats / targets

    def log(self) -> None:
        record = {"step": self.step, **self.window.summary(), "lr": self.lr, "norm": self.norm, **self.spent()}
        self.metrics.write({**record, "seconds": self.window.all_seconds})
        self.window.reset()

    def spent(self) -> dict[str, float]:
        """Bytes trained on so far, and the FLOPs of that: forward once and backward twice."""
        return {"bytes": self.bytes, "flops": TRAINING * self.flops_per_byte * self.bytes}

    def validate(self) -> dict[str, float]:
        """Bits per byte on the validation text, every target (also EOS) counted, up to `data.valid_bytes`."""
        assert self.valid is not None
        window = Window()
        for batch in self.valid().one_pass():
            window.add(self.objective(batch)[0].item(), batch)
            if window.bytes >= self.config.data.valid_bytes:
                break
        return {"valid_bpb": window.summary()["bpb"], "valid_bytes": window.bytes}

    def save(self) -> None:
        """Writes the snapshot of this step, once."""
        if self._saved == self.step:
            return
        content = {
            "config": self.config.model_dump(mode="json"),
            "model": self.objective.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state(),
            "bytes": self.bytes,
            "rng": torch.get_rng_state(),
            "window": self.window.state(),
            "extra": self.extra,
        }
        snapshots.write(self.folder, self.step, content, self.config.run.keep_checkpoints)
        self._saved = self.step

    def restore(self, content: dict[str, Any]) -> None:
        """Goes on from a snapshot. Raises CheckpointError if its model, data or batch shape is another one."""
        _same_run(content["config"], self.config.model_dump(mode="json"))
        self.objective.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        chosen = self.config.optimizer  # a state dict also brings the settings that it was saved with
        for group in self.optimizer.param_groups:
            group.update(betas=chosen.betas, eps=chosen.eps, weight_decay=chosen.weight_decay)
        self.loader.restore(content["loader"])
        torch.set_rng_state(content["rng"])
        self.step, self.bytes = content["step"], content["bytes"]
        self._saved = self.step
        self.window.restore(content.get("window", {}))

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


def _same_run(old: dict[str, Any], new: dict[str, Any]) -> None:
    """What decides the weights' shapes and the next batch must agree; optimizer, schedule and logging may change."""
    for section, keys in SAME.items():
        for key in keys or (section,):
            before, now = (config[section].get(key) if keys else config.get(section) for config in (old, new))
            if before != now:
                where = f"{section}.{key}" if keys else section
                raise CheckpointError(
                    f"the checkpoint was made with another {where!r}; "
                    "use the same configuration, or start anew in another output folder"
                )


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
