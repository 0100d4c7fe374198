"""Where the time of some steps goes (`blt train --profile 20:25`): torch's profiler, a trace, and a short table.

The loop names its regions with `record_function`. While steps are profiled, the stages of a BLT that is not compiled
as one graph are regions, too. The first rank is profiled; its collectives include the wait for other ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from blt.model import BLT
from blt.train.objective import Objective

log = logging.getLogger("blt.train")
FOLDER = "profile"
"""In the run folder."""
DATA, FORWARD, BACKWARD, OPTIMIZER = "blt/data", "blt/forward", "blt/backward", "blt/optimizer"
STAGES = {"encode": "encoder", "pool": "encoder", "run_latent": "latent", "decode": "decoder"}
"""Methods of a BLT whose time is that of a stage."""
REGIONS = (
    DATA, FORWARD, *(f"{FORWARD}/{stage}" for stage in dict.fromkeys(STAGES.values())), BACKWARD, OPTIMIZER,
)  # fmt: skip
COLLECTIVES = ("gloo:", "nccl:")
"""How the names of the profiler's events of collectives begin."""
P = ParamSpec("P")
R = TypeVar("R")


class Row(NamedTuple):
    """A region of the table: milliseconds a step on the host, and of the GPU's kernels that it started."""

    region: str
    host: float
    device: float


class StepProfile:
    """Profiles the steps from `first` to `last`, which count from 1. 0 and 0: none."""

    def __init__(self, first: int = 0, last: int = 0, folder: Path = Path()):
        self.first, self.last, self.folder = first, last, folder
        self._profiler: profile | None = None

    @contextmanager
    def step(self, step: int, objective: Objective) -> Iterator[None]:
        """Around each step. After the last one, writes the trace and logs the table."""
        if not self.first <= step <= self.last:
            yield
            return
        if self._profiler is None:
            devices = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profiler = profile(activities=devices)
            self._profiler.start()
            self._started = step
        try:
            with _stages(objective), record_function("blt/step"):
                yield
        except BaseException:
            self._stop()
            raise
        if step == self.last:
            self._report(self._stop(), step)

    def _stop(self) -> profile:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        profiler.stop()
        return profiler

    def _report(self, profiler: profile, step: int) -> None:
        path = self.folder / f"steps-{self._started}-{step}.json.gz"
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        rows = table(profiler.key_averages(), step - self._started + 1)
        log.info("steps %d to %d, profiled (trace: %s):\n%s", self._started, step, path, _text(rows))


def table(events: Iterable[Any], steps: int) -> list[Row]:
    """The whole step, the regions that ran, and all collectives, from the profiler's averages by name."""
    found: dict[str, Row] = {}
    for event in events:
        region = "collectives" if event.key.startswith(COLLECTIVES) else event.key
        if region in (*REGIONS, "blt/step", "collectives"):
            earlier = found.get(region, Row(region, 0.0, 0.0))
            host, device = (time / 1000 / steps for time in (event.cpu_time_total, event.device_time_total))
            found[region] = Row(region, earlier.host + host, earlier.device + device)
    return [found[region] for region in ("blt/step", *REGIONS, "collectives") if region in found]


def _text(rows: list[Row]) -> str:
    whole, lines = rows[0], []
    on_device = whole.device > 0
    for region, host, device in rows:
        name = region.removeprefix("blt/")
        name = "  " * name.count("/") + name.rpartition("/")[2]
        more = f"{device:10.1f} ms on the GPU" if on_device else ""
        lines.append(f"  {name:<14}{host:10.1f} ms a step{host / whole.host:8.1%}{more}")
    return "\n".join(lines)


@contextmanager
def _stages(objective: Objective) -> Iterator[None]:
    """While inside, the stages of a BLT are regions. A step that is compiled as one graph has none."""
    model = objective.model
    if not isinstance(model, BLT) or objective.compiles:
        yield
        return
    before = dict(model.__dict__)
    for method, stage in STAGES.items():
        model.__dict__[method] = _recorded(getattr(model, method), f"{FORWARD}/{stage}")
    try:
        yield
    finally:
        for method in STAGES:
            _put_back(model, before, method)


def _put_back(model: nn.Module, before: dict[str, Any], name: str) -> None:
    if name in before:
        model.__dict__[name] = before[name]
    else:
        del model.__dict__[name]


def _recorded(function: Callable[P, R], region: str) -> Callable[P, R]:
    @wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        with record_function(region):
            return function(*arguments, **options)

    return call
