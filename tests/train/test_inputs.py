"""The text that a run reads: a cut validation covers every group, and is the same for every kind of run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest

from blt.checkpoint import models
from blt.data import Batch, Dataset, prepare
from blt.data.entropies import CHUNK, ChunkedPass, Float, Tokens
from blt.data.patches import PatchIndex
from blt.model import EntropyConfig, EntropyModel
from blt.train import Terminated, checkpoints, train
from blt.train.config import load_config
from blt.train.inputs import prepare_inputs
from blt.train.setup import prepare_run
from blt_runtime.errors import CheckpointError

GROUPS = 12


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve groups of thirty documents of 40 to 160 bytes for validation, one group after the other."""
    folder = tmp_path_factory.mktemp("grouped")
    random = np.random.default_rng(0)
    for split in ("train", "valid"):
        (folder / "text" / split).mkdir(parents=True)
        for group in range(GROUPS):
            documents = [bytes(random.integers(97, 123, n, np.uint8)) for n in random.integers(40, 160, 30)]
            (folder / "text" / split / f"group-{group:02d}.txt").write_bytes(b"\0".join(documents))
    prepare([folder / "text"], folder / "data")
    return folder / "data"


def validation(repo: Path, data: Path, *options: str, n_bytes: int = 1 << 30) -> list[Batch]:
    """The batches of a validation of `n_bytes`, as `Trainer.validate` reads them."""
    config = load_config(repo / "configs" / "tiny-entropy.yaml", [*options, f"data.valid_bytes={n_bytes}"])
    make = prepare_inputs(config, data).loaders["valid"]
    assert make is not None
    return list(make().one_pass())


def counted(batches: list[Batch]) -> list[int]:
    """The bytes and EOS whose loss counts, sorted by value: what validation reads, in any order of rows."""
    return sorted(int(target) for batch in batches for target in batch.targets[batch.mask])


def documents_of(batches: list[Batch]) -> set[int]:
    return {int(document) for batch in batches for row in batch.documents for document in row}


@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_a_cut_validation_touches_most_groups(repo: Path, grouped: Path, pack: str) -> None:
    documents = Dataset(grouped).split("valid")
    cut = documents_of(validation(repo, grouped, f"batch.pack={pack}", n_bytes=4000))
    assert len(cut) < len(documents) / 4
    assert len({documents.group(document) for document in cut}) > GROUPS / 2
    lengths = documents.lengths[sorted(cut)]
    assert lengths.min() < 70 < 130 < lengths.max()  # neither the long nor the short ones alone
    assert documents_of(validation(repo, grouped, f"batch.pack={pack}")) == set(range(len(documents)))


@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_validation_is_the_same_for_every_seed(repo: Path, grouped: Path, pack: str) -> None:
    first, second = (
        validation(repo, grouped, f"batch.pack={pack}", f"run.seed={seed}", n_bytes=3000) for seed in (1, 2)
    )
    assert len(first) == len(second)
    assert all((a.ids == b.ids).all() for a, b in zip(first, second, strict=True))


def test_validation_reads_the_same_bytes_for_all_rows_lengths_and_packings(repo: Path, grouped: Path) -> None:
    """What the loss counts is `data.valid_bytes` to the byte, and the same text, also if the last document is cut."""
    documents = Dataset(grouped).split("valid")
    shapes = list(product((1, 8, 64), ("[16]", "[20, 50, 128]"), ("stream", "documents")))
    for n_bytes in (999, 5000):
        texts = []
        for rows, buckets, pack in shapes:
            options = (f"batch.rows={rows}", f"batch.byte_buckets={buckets}", f"batch.pack={pack}")
            batches = validation(repo, grouped, *options, n_bytes=n_bytes)
            assert sum(batch.n_bytes for batch in batches) == n_bytes
            texts.append(counted(batches))
        assert all(ours == theirs for ours, theirs in pairwise(texts))
    everything = validation(repo, grouped)
    assert sum(batch.n_bytes for batch in everything) == documents.n_bytes
    assert sum(batch.n_targets for batch in everything) == documents.n_bytes + len(documents)


def test_the_same_bytes_cut_elsewhere_are_other_data(repo: Path, tmp_path: Path) -> None:
    text = b"the cat " * 40
    for name, end in {"one": 200, "other": 209}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_bytes(text[:end] + b"\0" + text[end:])
        prepare([tmp_path / name / "a.txt"], tmp_path / f"{name}-data", split=(1, 0, 0))
    shards = [(tmp_path / f"{name}-data" / "train-00000.bin").read_bytes() for name in ("one", "other")]
    assert shards[0] == shards[1]
    model = EntropyModel(EntropyConfig(dim=16, n_layers=1, n_heads=2))
    paths = {PatchIndex(Dataset(tmp_path / f"{name}-data"), "train", model).path.name for name in ("one", "other")}
    assert len(paths) == 2
    config = load_config(repo / "configs" / "tiny-entropy.yaml", ["schedule.steps=2", "schedule.warmup=1"])
    train(config, tmp_path / "run", data=tmp_path / "one-data")
    with pytest.raises(CheckpointError, match="data"):
        train(config, tmp_path / "run", data=tmp_path / "other-data")


def test_training_without_validation_text_warns(repo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_bytes(b"the cat " * 40)
    prepare([tmp_path / "a.txt"], tmp_path / "data", split=(1, 0, 0))
    config = load_config(repo / "configs" / "tiny-entropy.yaml")
    prepare_run(config, tmp_path / "run", tmp_path / "data")
    assert f"{tmp_path / 'data'} has no validation text, so no validation loss is measured" in caplog.text


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the 36 kB of `grouped` are several blocks."""
    monkeypatch.setattr("blt.data.packing.FIRST_BLOCK_TOKENS", 4096)
    monkeypatch.setattr("blt.data.patches.SAMPLE_TOKENS", 2048)
    monkeypatch.setitem(CHUNK, "cpu", 128)


def computed_share(data: Path) -> float:
    """The share of the training tokens whose entropies are in the cache."""
    (file,) = (data / "entropies").glob("*train-*")
    return float((np.load(file).view(np.int32) != 0).mean())


def losses(out: Path) -> list[str]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [f"{record['step']} {record['loss']} {record['norm']}" for record in records if "loss" in record]


@pytest.mark.usefixtures("small_blocks")
def test_training_computes_only_what_it_reads_and_equals_training_on_a_full_cache(
    repo: Path, grouped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [tmp_path / name for name in ("part", "full")]
    for folder in folders:
        shutil.copytree(grouped, folder, ignore=shutil.ignore_patterns("entropies"))
    train(
        load_config(repo / "configs" / "tiny-entropy.yaml", ["schedule={steps: 2, warmup: 1}"]),
        tmp_path / "e",
        data=grouped,
    )
    entropy = models.load(tmp_path / "e").entropy
    PatchIndex(Dataset(folders[1]), "train", entropy).compute()

    def run(data: Path, steps: int) -> list[str]:
        config = load_config(
            repo / "configs" / "tiny.yaml", [f"schedule={{steps: {steps}, warmup: 1}}", "run.log_every=1"]
        )
        train(config, data / "run", data=data, entropy_model=tmp_path / "e")
        return losses(data / "run")

    with caplog.at_level("INFO", "blt.train"):
        first = [run(data, 6) for data in folders]
    assert "computing the entropies that this run needs before its first step" in caplog.text
    assert "all are kept in" in caplog.text
    assert 0.1 < computed_share(folders[0]) < 0.6
    assert computed_share(folders[1]) == 1
    assert first[0] == first[1]
    more = [run(data, 30) for data in folders]  # reads beyond the first block; both continue
    assert computed_share(folders[0]) > 0.6
    assert more[0] == more[1]
    assert len(more[0]) == 30


@pytest.mark.usefixtures("small_blocks")
def test_a_checkpoint_of_other_blocks_is_refused(
    repo: Path, grouped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(repo / "configs" / "tiny-entropy.yaml", ["schedule={steps: 2, warmup: 1}"])
    train(config, tmp_path / "run", data=grouped)
    other = config.model_copy(update={"data": config.data.model_copy(update={"first_block_tokens": 8192})})
    with pytest.raises(CheckpointError, match="another order"):
        train(other, tmp_path / "run", data=grouped)
    monkeypatch.setattr("blt.train.inputs.FIRST_BLOCK_TOKENS", 8192)
    with pytest.raises(CheckpointError, match="another order"):
        train(config, tmp_path / "run", data=grouped)


@pytest.mark.usefixtures("small_blocks")
def test_sigterm_while_a_step_waits_for_entropies_loses_nothing(
    repo: Path, grouped: Path, entropy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that plans blocks sends it once the step waits for its block. It ends, and the resumed run has the
    losses and weights of an uninterrupted one."""
    folders = [tmp_path / name for name in ("whole", "stopped")]
    for folder in folders:
        shutil.copytree(grouped, folder, ignore=shutil.ignore_patterns("entropies"))
    config = load_config(repo / "configs" / "tiny.yaml", ["schedule={steps: 14, warmup: 1}", "run.log_every=1"])
    expected = train(config, tmp_path / "expected", data=folders[0], entropy_model=entropy_run).read_bytes()
    trainer = prepare_run(config, tmp_path / "run", folders[1], entropy_model=entropy_run)[0]
    run, sent = ChunkedPass.run, threading.Event()

    def signalling(self: ChunkedPass, ids: Tokens, begin: int = 0, end: int | None = None) -> Iterator[Float]:
        for values in run(self, ids, begin, end):
            if threading.current_thread() is not threading.main_thread() and not sent.is_set():
                until(lambda: trainer._at_once)  # no text is read ahead: each step waits for its own
                if trainer.state.step == 0:
                    yield values
                    continue
                sent.set()
                os.kill(os.getpid(), signal.SIGTERM)
                until(lambda: bool(checkpoints.checkpoint_folders(trainer.folder)))
            yield values

    monkeypatch.setattr(ChunkedPass, "run", signalling)
    before = threading.active_count()
    with pytest.raises(Terminated, match=r"saved at step [1-9]") as caught:
        trainer.run(14)
    assert caught.value.exit_code == 143
    until(lambda: threading.active_count() <= before)
    assert sent.is_set()
    assert trainer.state.step < 14
    found = train(config, tmp_path / "run", data=folders[1], entropy_model=entropy_run)
    assert found.read_bytes() == expected
    assert losses(tmp_path / "run") == losses(tmp_path / "expected")


def until(true: Callable[[], bool]) -> None:
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    pytest.fail("it never happened")
