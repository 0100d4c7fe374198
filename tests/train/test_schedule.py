"""The learning rate in short runs and in runs that continue with more or fewer steps; one trainer per folder."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError

from blt.train import train
from blt.train.config import RunConfig, ScheduleConfig, load_config
from blt.train.optim import learning_rate
from blt.train.resume import _check_decay
from blt_runtime.errors import UsageError

Log = pytest.LogCaptureFixture


@pytest.fixture
def run(entropy_run: Path, tmp_path: Path) -> Path:
    """A finished run of 40 steps."""
    return Path(shutil.copytree(entropy_run, tmp_path / "run"))


def configured(repo: Path, *settings: str) -> RunConfig:
    return load_config(repo / "configs" / "tiny-entropy.yaml", ["run.log_every=1", *settings])


def rates(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["lr"] for line in lines if "lr" in line}


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_schedule() -> None:
    schedule = ScheduleConfig(steps=100, warmup=10, min_ratio=0.1)
    found = [learning_rate(step, 2.0, schedule) for step in range(101)]
    assert found[0] == pytest.approx(0.2)
    assert found[9] == found[10] == pytest.approx(2.0)
    assert found[55] == pytest.approx(1.1)
    assert found[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(found[10:]))


def test_the_rate_is_constant_after_the_decay() -> None:
    schedule = ScheduleConfig(steps=100, warmup=10, decay_steps=40)
    whole = ScheduleConfig(steps=40, warmup=10)
    assert [learning_rate(step, 1.0, schedule) for step in range(41)] == [
        learning_rate(step, 1.0, whole) for step in range(41)
    ]
    assert learning_rate(99, 1.0, schedule) == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 199])
def test_a_warmup_longer_than_the_run_is_shortened(steps: int) -> None:
    schedule = ScheduleConfig(steps=steps, warmup=200)
    found = [learning_rate(step, 1.0, schedule) for step in range(steps)]
    assert schedule.warmup_steps == steps // 10
    assert max(found) == 1.0
    assert ScheduleConfig(steps=steps, warmup=steps).warmup_steps == steps


def test_every_shipped_configuration_runs_a_few_steps(repo: Path) -> None:
    files = [file for file in (repo / "configs").rglob("*.yaml") if "byteify" not in file.name]
    assert len(files) > 10
    for file in files:
        config = load_config(file, ["schedule.steps=3"])
        assert learning_rate(0, config.optimizer.lr, config.schedule) == pytest.approx(config.optimizer.lr)


def test_a_shortened_warmup_is_reported(repo: Path, data: Path, tmp_path: Path, caplog: Log) -> None:
    with caplog.at_level("INFO", "blt.train"):
        train(configured(repo, "schedule={steps: 2, warmup: 300}"), tmp_path / "run", data=data)
    assert "the warm-up of 300 steps is longer than the run of 2; shortened to 0" in caplog.text
    assert rates(tmp_path / "run")[1] == pytest.approx(0.01)


def test_more_steps_keep_the_final_rate(repo: Path, data: Path, run: Path, caplog: Log) -> None:
    last = learning_rate(39, 0.01, ScheduleConfig(steps=40, warmup=5))
    with caplog.at_level("INFO", "blt.train"):
        train(configured(repo, "schedule.steps=43"), run, data=data)
    assert "steps 41 to 43 keep its final learning rate" in caplog.text
    found = rates(run)
    assert [found[step] for step in (41, 42, 43)] == pytest.approx([0.001] * 3)
    assert abs(found[41] - last) < 0.02 * last
    caplog.clear()
    train(configured(repo, "schedule.steps=45"), run, data=data)  # the end of the cosine is remembered
    assert rates(run)[45] == pytest.approx(0.001)


def test_a_run_that_continues_is_that_of_one_call(repo: Path, data: Path, run: Path, tmp_path: Path) -> None:
    train(configured(repo, "schedule.steps=43"), run, data=data)
    train(configured(repo, "schedule={steps: 43, warmup: 5, decay_steps: 40}"), tmp_path / "whole", data=data)
    ours, whole = rates(run), rates(tmp_path / "whole")
    assert all(ours[step] == whole[step] for step in (41, 42, 43))
    lines = [(folder / "metrics.jsonl").read_text().splitlines()[-1] for folder in (run, tmp_path / "whole")]
    assert json.loads(lines[0])["valid_bpb"] == json.loads(lines[1])["valid_bpb"]


def test_a_requested_decay_is_announced(repo: Path, data: Path, run: Path, caplog: Log) -> None:
    with caplog.at_level("INFO", "blt.train"):
        train(configured(repo, "schedule={steps: 42, warmup: 5, decay_steps: 80}"), run, data=data)
    assert "the learning rate of step 41 is 0.00597 instead of 0.001" in caplog.text
    assert rates(run)[41] == pytest.approx(0.00597, rel=0.01)


def test_the_wsd_schedule() -> None:
    schedule = ScheduleConfig(kind="wsd", steps=100, warmup=10, decay=20, min_ratio=0.1)
    found = [learning_rate(step, 2.0, schedule) for step in range(121)]
    assert found[0] == pytest.approx(0.2)
    assert found[9:81] == [2.0] * 72
    assert found[85] == pytest.approx(2 * (0.1 + 0.9 * 0.75))
    assert found[90] == pytest.approx(1.1)
    assert found[100:] == pytest.approx([0.2] * 21)
    assert all(a > b for a, b in pairwise(found[80:101]))
    assert ScheduleConfig(kind="wsd", steps=100, warmup=5).decay_length == 10
    assert ScheduleConfig(kind="wsd", steps=100, warmup=95, decay=20).decay_start == 95
    with pytest.raises(ValidationError, match="decay is for kind wsd"):
        ScheduleConfig(decay=20)


def wsd(repo: Path, steps: int, decay: int | None = 4) -> RunConfig:
    schedule = f"schedule={{kind: wsd, steps: {steps}, warmup: 2, decay: {'null' if decay is None else decay}}}"
    return configured(repo, schedule, "run.checkpoint_every=4", "run.keep_checkpoints=9")


@pytest.fixture(scope="module")
def wsd_run(repo: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps; the rate falls in the last four."""
    out = tmp_path_factory.mktemp("wsd") / "run"
    train(wsd(repo, 12), out, data=data)
    return out


def checkpoint_at(run: Path, step: int) -> str:
    return str(run / "checkpoints" / f"step-{step:08d}")


def falling(steps: int) -> list[float]:
    """The rates of a decay of so many steps."""
    return [0.01 * (0.1 + 0.9 * (1 - i / steps)) for i in range(steps)]


def test_a_decay_can_begin_at_any_stable_checkpoint(
    repo: Path, data: Path, wsd_run: Path, tmp_path: Path, caplog: Log
) -> None:
    assert [rates(wsd_run)[step] for step in range(3, 9)] == [0.01] * 6
    assert [rates(wsd_run)[step] for step in range(9, 13)] == pytest.approx(falling(4))
    train(wsd(repo, 8), tmp_path / "short", data=data, resume=checkpoint_at(wsd_run, 4))
    assert [rates(tmp_path / "short")[step] for step in range(5, 9)] == pytest.approx(falling(4))
    train(wsd(repo, 6, decay=2), tmp_path / "shorter", data=data, resume=checkpoint_at(wsd_run, 4))
    assert [rates(tmp_path / "shorter")[step] for step in (5, 6)] == pytest.approx(falling(2))
    assert "the learning rate of step" not in caplog.text


def test_a_longer_wsd_run_from_a_stable_checkpoint_is_that_of_one_call(
    repo: Path, data: Path, wsd_run: Path, tmp_path: Path
) -> None:
    """Step 8 is the last before the decay of the shorter run."""
    train(wsd(repo, 16), tmp_path / "longer", data=data, resume=checkpoint_at(wsd_run, 8))
    train(wsd(repo, 16), tmp_path / "whole", data=data)
    ours, whole = rates(tmp_path / "longer"), rates(tmp_path / "whole")
    assert [ours[step] for step in range(9, 17)] == [whole[step] for step in range(9, 17)]
    assert [ours[step] for step in range(9, 13)] == [0.01] * 4
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1] for name in ("longer", "whole")]
    assert json.loads(lines[0])["valid_bpb"] == json.loads(lines[1])["valid_bpb"]


@pytest.mark.parametrize("decay", [4, None])
def test_a_decayed_wsd_run_with_more_steps_keeps_its_final_rate(
    repo: Path, data: Path, wsd_run: Path, tmp_path: Path, caplog: Log, decay: int | None
) -> None:
    run = Path(shutil.copytree(wsd_run, tmp_path / "run"))
    with caplog.at_level("INFO", "blt.train"):
        train(wsd(repo, 14, decay), run, data=data)
    assert "steps 13 to 14 keep its final learning rate" in caplog.text
    assert "a checkpoint up to step 8 continues at the full rate" in caplog.text
    assert [rates(run)[step] for step in (13, 14)] == pytest.approx([0.001] * 2)
    train(wsd(repo, 15, decay), run, data=data)
    assert rates(run)[15] == pytest.approx(0.001)
    train(wsd(repo, 16, decay), tmp_path / "middle", data=data, resume=checkpoint_at(run, 12))
    assert rates(tmp_path / "middle")[16] == pytest.approx(0.001)


@pytest.mark.parametrize(("made", "steps", "decay"), [(4, 6, 4), (8, 9, 4), (8, 10, None), (100, 105, None), (7, 8, 3)])
def test_a_decay_that_would_have_begun_is_refused_with_what_fits(made: int, steps: int, decay: int | None) -> None:
    def schedule(steps: int, decay: int | None) -> ScheduleConfig:
        return ScheduleConfig(kind="wsd", steps=steps, warmup=1, decay=decay)

    if schedule(steps, decay).decay_start >= made:
        _check_decay(schedule(steps, decay), made)
        return
    with pytest.raises(UsageError, match="begins before step") as refused:
        _check_decay(schedule(steps, decay), made)
    longer, shorter = map(
        int, re.findall(r"--steps (\d+) or more, or --set schedule.decay=(\d+)", str(refused.value))[0]
    )
    assert schedule(longer, decay).decay_start >= made
    assert schedule(longer - 1, decay).decay_start < made
    assert schedule(steps, shorter).decay_start == made


def test_a_decay_that_would_have_begun_changes_nothing(repo: Path, data: Path, wsd_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"give --steps 8 or more, or --set schedule.decay=2"):
        train(wsd(repo, 6), tmp_path / "run", data=data, resume=checkpoint_at(wsd_run, 4))
    assert not (tmp_path / "run").exists()


def test_fewer_steps_than_were_made_change_nothing(repo: Path, data: Path, run: Path) -> None:
    before = content(run)
    with pytest.raises(UsageError, match=r"40 steps already.*20 asked for; nothing was changed"):
        train(configured(repo, "schedule.steps=20"), run, data=data)
    assert content(run) == before


def test_fewer_steps_than_planned_do_not_change_the_rate(
    repo: Path, data: Path, entropy_run: Path, tmp_path: Path
) -> None:
    older = entropy_run / "checkpoints" / "step-00000020"
    train(configured(repo, "schedule.steps=25"), tmp_path / "run", data=data, resume=str(older))
    schedule = ScheduleConfig(steps=40, warmup=5)
    assert rates(tmp_path / "run")[25] == pytest.approx(learning_rate(24, 0.01, schedule))


def test_a_finished_run_that_is_started_again_is_reported(repo: Path, data: Path, run: Path, caplog: Log) -> None:
    before = rates(run)
    with caplog.at_level("INFO", "blt.train"):
        train(configured(repo), run, data=data)
    assert "the run is finished: all 40 steps are made" in caplog.text
    assert rates(run) == before


HOLDER = """
import sys, time
from pathlib import Path
from blt.train.run import only_trainer
with only_trainer(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_trainer_is_refused_and_a_dead_one_is_not_in_the_way(repo: Path, data: Path, run: Path) -> None:
    before = content(run)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UsageError, match="another process is training in"):
            train(configured(repo, "schedule.steps=41"), run, data=data)
        assert content(run) == before
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    train(configured(repo, "schedule.steps=41"), run, data=data)
    assert rates(run)[41]


def test_a_folder_that_was_made_for_a_lock_does_not_stay(repo: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such data folder"):
        train(configured(repo), tmp_path / "run", data=tmp_path / "missing")
    assert not (tmp_path / "run").exists()


def test_a_file_system_without_locks_still_trains(
    repo: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(9, os.strerror(9))

    monkeypatch.setattr(fcntl, "flock", refuse)
    train(configured(repo, "schedule.steps=1"), tmp_path / "run", data=data)
    assert (tmp_path / "run" / "model.pt").is_file()
