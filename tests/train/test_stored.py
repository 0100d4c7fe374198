"""Training on stored boundaries: the same bits as without them, and one clear error for those of another run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blt.data import Dataset, boundaries, boundary_pass
from blt.data.boundary_pass import Request
from blt.data.entropies import CHUNK, ChunkedPass
from blt.train import train
from blt.train.config import BLTRun, load_config
from blt.train.inputs import frozen_entropy, prepare_inputs
from blt_runtime.errors import CheckpointError, ConfigError, InputError
from tests.train.test_parallel import records

SETTINGS = ("schedule={steps: 8, warmup: 2}", "run={compile: false, log_every: 1, valid_every: 4, checkpoint_every: 4}")
Folders = tuple[Path, Path]


def config_of(repo: Path, *settings: str) -> BLTRun:
    config = load_config(repo / "configs" / "tiny.yaml", [*SETTINGS, *settings])
    assert isinstance(config, BLTRun)
    return config


def store(config: BLTRun, data: Path, entropy_run: Path, folder: Path, **more: object) -> Path:
    """Stores the boundaries that this run needs."""
    dataset, model, patching = Dataset(data), frozen_entropy(entropy_run, "cpu"), config.patching
    target = patching.target_patch_size if patching.needs_threshold else None
    request = Request(("train", "valid"), patching.rule(0.0), target, groups=config.data.groups, **more)  # type: ignore[arg-type]
    plan = boundary_pass.plan_for(dataset, model, request, folder)
    boundary_pass.compute(dataset, model, plan, folder)
    return folder


@pytest.fixture
def two_data(data: Path, tmp_path: Path) -> Folders:
    """Two copies of the data, without what other tests computed."""
    folders = tmp_path / "plain", tmp_path / "with"
    for folder in folders:
        shutil.copytree(data, folder, ignore=shutil.ignore_patterns("entropies", "boundaries"))
    return folders


def test_training_is_bit_identical(
    repo: Path, entropy_run: Path, two_data: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, norms, validation and weights; also of a run that begins without boundaries and is resumed with them."""
    monkeypatch.setitem(CHUNK, "cpu", 256)
    plain, other = two_data
    config = config_of(repo)
    weights = train(config, tmp_path / "plain-run", data=plain, entropy_model=entropy_run).read_bytes()
    halfway = tmp_path / "resumed"
    first = config_of(repo, "schedule={steps: 4, decay_steps: 8, warmup: 2}")
    train(first, halfway, data=plain, entropy_model=entropy_run)
    found = store(config, other, entropy_run, other / boundaries.FOLDER / "any-name")
    monkeypatch.setattr(ChunkedPass, "run", lambda *_: pytest.fail("the entropy model runs"))
    stored = train(config, tmp_path / "stored", data=other, entropy_model=entropy_run)
    assert stored.read_bytes() == weights
    assert records(tmp_path / "stored") == records(tmp_path / "plain-run")
    assert sum("valid_bpb" in record for record in records(stored.parent)) == 2
    named = found.rename(tmp_path / "named")
    resumed = train(config, halfway, data=other, entropy_model=entropy_run, boundaries=named)
    assert resumed.read_bytes() == weights
    assert records(halfway)[-3:] == records(stored.parent)[-3:]


def test_boundaries_of_another_run_are_refused(
    repo: Path, entropy_run: Path, two_data: Folders, tmp_path: Path
) -> None:
    data, config = two_data[0], config_of(repo)
    folder = store(config, data, entropy_run, tmp_path / "b")
    threshold = boundaries.read_plan(folder).rule.threshold

    def message(config: BLTRun, data: Path = data, folder: Path = folder, entropy: Path = entropy_run) -> str:
        with pytest.raises((ConfigError, InputError)) as caught:
            prepare_inputs(config, data, entropy_model=entropy, boundaries=folder)
        return str(caught.value)

    train(load_config(repo / "configs" / "tiny-entropy.yaml", ["run.seed=1"]), tmp_path / "other", data=data)
    assert "another entropy model" in message(config, entropy=tmp_path / "other")
    assert f"set patching.threshold={threshold}" in message(config_of(repo, "patching.target_patch_size=3"))
    assert "max_patch_length 7, not 8" in message(config_of(repo, "patching.max_patch_length=7"))
    assert "threshold 2.0, not" in message(config_of(repo, "patching.threshold=2.0"))
    assert "needs no stored boundaries" in message(config_of(repo, "patching.scheme=space"))
    assert "other data.groups" in message(config_of(repo, "data.groups=[words]"))
    assert "holds no boundaries" in message(config, folder=tmp_path)
    (folder / "valid-00000.json").unlink()
    assert "lacks 1 of 2 shards, first valid-00000" in message(config)
    given = config_of(repo, f"patching.threshold={threshold}")
    prepare_inputs(given, data, entropy_model=entropy_run, boundaries=folder, splits=("train",))


def test_boundaries_of_other_text_are_refused(repo: Path, entropy_run: Path, two_data: Folders, tmp_path: Path) -> None:
    from blt.data import prepare

    config = config_of(repo)
    folder = store(config, two_data[0], entropy_run, tmp_path / "b")
    (tmp_path / "train.txt").write_bytes(b"\0".join(b"other words %d" % i for i in range(60)))
    prepare([tmp_path / "train.txt"], tmp_path / "text", split=(80, 20, 0))
    with pytest.raises(InputError, match=r"of other text .*train-00000 differs"):
        prepare_inputs(config, tmp_path / "text", entropy_model=entropy_run, boundaries=folder)


def test_what_does_not_fit_is_not_found(
    repo: Path, entropy_run: Path, two_data: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """bfloat16, an incomplete folder, another rule: the run computes its own entropies, and a log line says why."""
    plain, data = two_data
    config, places = config_of(repo), data / boundaries.FOLDER
    store(config, data, entropy_run, places / "1", dtype="bfloat16")
    store(config_of(repo, "patching.max_patch_length=7"), data, entropy_run, places / "2")
    (store(config, data, entropy_run, places / "3") / "train-00000.json").unlink()
    (places / "4").mkdir()
    (places / "4" / "boundaries.json").write_text("{")
    with caplog.at_level("INFO", "blt.train"):
        ours = prepare_inputs(config, data, entropy_model=entropy_run)
    assert caplog.text.count("not used: ") == 4
    expected = prepare_inputs(config, plain, entropy_model=entropy_run)
    assert (ours.extra, ours.config) == (expected.extra, expected.config)
    store(config, data, entropy_run, places / "3")
    caplog.clear()
    with caplog.at_level("INFO", "blt.train"):
        assert prepare_inputs(config, data, entropy_model=entropy_run).extra == expected.extra
    assert f"boundaries: read from {places / '3'}" in caplog.text


def test_boundaries_in_bfloat16_train_when_they_are_named_and_are_other_data(
    repo: Path, entropy_run: Path, two_data: Folders, tmp_path: Path
) -> None:
    config, data = config_of(repo, "schedule={steps: 2, warmup: 1}"), two_data[0]
    folder = store(config, data, entropy_run, tmp_path / "b", dtype="bfloat16")
    train(config, tmp_path / "run", data=data, entropy_model=entropy_run, boundaries=folder)
    with pytest.raises(CheckpointError, match="entropy"):
        train(config, tmp_path / "run", data=data, entropy_model=entropy_run)


@pytest.mark.slow
def test_two_ranks_train_bit_identically(repo: Path, entropy_run: Path, two_data: Folders, tmp_path: Path) -> None:
    """On stored boundaries and without any."""
    plain, data = two_data
    settings = ("schedule={steps: 4, warmup: 2}", *SETTINGS[1:], "batch.micro_rows=1")
    folder = store(config_of(repo, *settings), data, entropy_run, tmp_path / "b")
    for place, more in ((plain, []), (data, ["--boundaries", str(folder)])):
        paths = os.pathsep.join(str(repo / part) for part in (".", "export", "runtime"))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "blt.cli", "train", "blt", "-c", f"{repo}/configs/tiny.yaml", "--data", str(place), *more]
        command += ["-o", f"{place}/run", "--entropy-model", str(entropy_run), "--threads", "1", "--device", "cpu"]
        command += [word for setting in settings for word in ("--set", setting)]
        subprocess.run(command, env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, check=True)
    assert records(data / "run") == records(plain / "run")
    assert (data / "run" / "model.pt").read_bytes() == (plain / "run" / "model.pt").read_bytes()
