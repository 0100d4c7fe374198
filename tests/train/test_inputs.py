"""What a run reads: a cut validation sees every group, and the same text whatever the run is."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest

from blt.data import Batch, Dataset, prepare
from blt.data.patches import PatchIndex
from blt.model import EntropyConfig, EntropyModel
from blt.train import train
from blt.train.config import load_config
from blt.train.inputs import prepare_inputs
from blt_runtime.errors import CheckpointError

GROUPS = 12


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve groups of thirty documents of 40 to 160 bytes for validation, one group behind the other."""
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
    """The batches of validation that begin before `n_bytes`, as `Trainer.validate` takes them."""
    make = prepare_inputs(load_config(repo / "configs" / "tiny-entropy.yaml", list(options)), data).loaders["valid"]
    assert make is not None
    seen = 0

    def more(batch: Batch) -> bool:
        nonlocal seen
        seen += batch.n_bytes
        return seen - batch.n_bytes < n_bytes

    return list(takewhile(more, make().one_pass()))


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


def test_streams_of_other_row_lengths_validate_the_same_text(repo: Path, grouped: Path) -> None:
    small, large = (
        documents_of(validation(repo, grouped, "batch.rows=1", f"batch.byte_buckets=[{length}]", n_bytes=5000))
        for length in (16, 128)
    )
    assert small <= large
    assert len(large - small) <= 3


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
