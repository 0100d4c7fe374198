"""Progress of a run: in a terminal, in a log file and in TensorBoard."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from blt.data import Batch
from blt.data.quantities import duration
from blt.train import metrics, progress
from blt.train.config import EntropyRun, load_config
from blt.train.setup import prepare_run
from blt_runtime.errors import MissingExtra

Log = pytest.LogCaptureFixture
STEP_BYTES = 4


class Clock:
    """A clock that a test advances."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(metrics, "time", clock)
    return clock


@pytest.fixture
def info(caplog: Log) -> Log:
    caplog.set_level(logging.INFO, logger="blt.train")
    logging.getLogger("blt").propagate = True  # a test of the command line may have switched it off
    return caplog


def a_batch() -> Batch:
    """A row of five ids, four of which count, and one position of padding, in two patches."""
    ids = np.full((1, 6), 70)
    mask = np.array([[True] * STEP_BYTES + [False] * 2])
    return Batch(ids, ids, mask, np.array([[3, 2, 0]]), np.array([0]), block=0, row_tokens=np.array([5]))


def test_a_line_every_few_seconds_with_the_means_since_the_last(clock: Clock, info: Log) -> None:
    lines = progress.ProgressLines(100)
    for step in range(1, 8):
        clock.now += 2.0
        lines.step(step, STEP_BYTES * np.log(2) * step, a_batch())
    assert [record.getMessage() for record in info.records] == [
        "step 3 of 100: 2.000 bits/byte, 3 min 14 s left, 2 B/s, 2.50 bytes/patch, "
        "padding 16.7% of bytes, 33.3% of patches",
        "step 6 of 100: 5.000 bits/byte, 3 min 08 s left, 2 B/s, 2.50 bytes/patch, "
        "padding 16.7% of bytes, 33.3% of patches",
    ]


def test_a_record_replaces_a_line_in_the_same_words(clock: Clock, info: Log) -> None:
    lines = progress.ProgressLines(100)
    for step in range(1, 8):
        clock.now += 2.0
        lines.step(step, 1.0, a_batch())
        if step % 2:
            lines.record({"step": step, "bpb": 1.0, "bytes_per_s": 12345.0, "lr": 0.001, "norm": 0.5})
    assert [record.getMessage() for record in info.records] == [
        f"step {step} of 100: 1.000 bits/byte, {left}12.3 kB/s, learning rate 0.001, gradient norm 0.5"
        for step, left in ((1, ""), *((step, f"{duration(2.0 * (100 - step))} left, ") for step in (3, 5, 7)))
    ]


def test_records_of_validation_and_of_skipped_steps(info: Log) -> None:
    lines = progress.ProgressLines(2000)
    lines.record({"step": 1000, "valid_bpb": 1.5, "valid_bytes": 1_048_600, "bytes": 7, "flops": 1e9})
    lines.record({"step": 1000, "skipped": 3, "bytes": 7, "flops": 1e9, "seconds": 4.0})
    assert [record.getMessage() for record in info.records] == [
        "step 1,000 of 2,000: validation 1.500 bits/byte, 1.05 MB of text",
        "step 1,000 of 2,000: 3 steps skipped",
    ]


def test_validation_is_not_in_the_speed(clock: Clock) -> None:
    pace = progress.ProgressLines(100)
    pace.step(1, 1.0, a_batch())
    clock.now += 1000.0
    pace.record({"step": 1, "valid_bpb": 2.0, "valid_bytes": 9})
    clock.now += 2.0
    pace.step(2, 1.0, a_batch())
    assert pace.window.summary()["bytes_per_s"] == STEP_BYTES / 2.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_and_log_lines_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    logger = logging.getLogger("blt")
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(logger, "handlers", [handler])
    request.addfinalizer(partial(logger.setLevel, logger.level))
    logger.setLevel(logging.INFO)
    with progress.observing(tmp_path, steps=2, at=0) as observers:
        observers.step(1, 1.0, a_batch())
        logging.getLogger("blt.train").info("a line of the log with [brackets]")
        observers.step(2, STEP_BYTES * np.log(2) * 3, a_batch())
    assert handler.stream is terminal
    shown = terminal.getvalue()
    assert "a line of the log with [brackets]\n" in shown
    assert "step 2 of 2" in shown
    assert "bits/byte" in shown


def at_width(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, width: int) -> list[str]:
    """Output of a run on a terminal of this width, without control sequences."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    logger = logging.getLogger("blt")
    monkeypatch.setattr(logger, "handlers", [])  # a command that ran before leaves one, whose stream may be closed
    before = logger.level
    logger.setLevel(logging.INFO)
    with progress.observing(tmp_path, steps=1200, at=1198) as observers:
        for step in (1199, 1200):
            observers.step(step, STEP_BYTES * np.log(2) * 2, a_batch())
    logger.setLevel(before)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).replace("\r", "\n").splitlines()


@pytest.mark.parametrize(("width", "numbers"), [(40, 1), (60, 2), (90, 3), (160, 5)])
def test_a_narrow_terminal_keeps_the_counter_and_whole_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, numbers: int
) -> None:
    last = [line for line in at_width(monkeypatch, tmp_path, width) if "bits/byte" in line][-1].rstrip()
    assert last.startswith("step 1,200 of 1,200 ")
    assert len(last) <= width
    assert "…" not in last
    assert last.count(", ") >= numbers - 1
    assert ("━" in last) == (width >= progress.WIDE)


def test_other_ranks_print_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, info: Log) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress.observing(tmp_path, 10, 0, tensorboard=True) as observers:
        for step in range(1, 5):
            clock.now += 10.0
            observers.step(step, 1.0, a_batch())
        observers.record({"step": 4, "loss": 1.0})
    assert not info.records
    assert not list(tmp_path.iterdir())


def scalars_in(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_metrics_also_after_a_resume(repo: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    settings = ["run.tensorboard=true", "run.log_every=2", "run.valid_every=4", "run.checkpoint_every=4"]
    config = load_config(repo / "configs" / "tiny-entropy.yaml", settings)
    assert isinstance(config, EntropyRun)
    trainer = prepare_run(config, tmp_path / "run", data)[0]
    trainer.run(8)
    with progress.observing(tmp_path / "run", 8, at=4, tensorboard=True) as observers:  # killed at 8, resumed from 4
        observers.record({"step": 6, "loss": 0.5, "buckets": {"64": 2}})
    found = scalars_in(tmp_path / "run" / progress.TENSORBOARD)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["loss"] for r in records if "loss" in r and r["step"] <= 4}
    assert found["train/loss"] == pytest.approx(losses | {6: 0.5})
    assert found["valid/bpb"] == pytest.approx({4: next(r["valid_bpb"] for r in records if "valid_bpb" in r)})
    assert {"train/bpb", "train/padding", "train/lr", "train/bytes", "train/flops", "valid/bytes"} <= set(found)
    assert found["train/buckets/64"][6] == 2.0


def test_a_missing_tensorboard_is_reported_before_the_first_step(
    repo: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = load_config(repo / "configs" / "tiny-entropy.yaml", ["run.tensorboard=true"])
    trainer = prepare_run(config, tmp_path / "run", data)[0]
    with pytest.raises(MissingExtra, match=r"blt-lm\[tensorboard\]"):
        trainer.run(1)
    assert trainer.state.step == 0
