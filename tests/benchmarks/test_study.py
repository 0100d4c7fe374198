"""benchmarks/study.py: every model of the study has the same FLOPs per byte. Nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from blt.data import Dataset, prepare
from blt.train.config import BLTRun, BPERun

MODELS = 11


@pytest.fixture(scope="module")
def study(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("study")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> Dataset:
    """A few documents of this project's own prose: words of about six bytes, tokens of about three."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "text").mkdir()
    for path in sorted((repo / "docs").glob("*.md")):
        (folder / "text" / f"{path.stem}.txt").write_bytes(path.read_bytes())
    prepare([folder / "text"], folder / "data", split=(1, 0, 0))
    return Dataset(folder / "data")


@pytest.mark.parametrize("number", range(MODELS))
def test_flops_and_text_are_those_of_the_byte_level_transformer(study: ModuleType, data: Dataset, number: int) -> None:
    assert len(study.VARIANTS) == MODELS
    run = study.fitted(study.VARIANTS[number], data, 3_000_000)
    budget = study._flops(study.fitted(study.VARIANTS[0], data, 3_000_000).config, None)
    assert study._flops(run.config, run.unit) == pytest.approx(budget, rel=0.01)
    assert run.config.schedule.steps == 732
    row = run.config.batch.byte_buckets[-1] * (run.unit if isinstance(run.config, BPERun) else 1)
    assert row == pytest.approx(1024, rel=0.005)
    if isinstance(run.config, BLTRun):
        assert run.config.batch.patches * run.unit > 1.1 * 1024
        assert run.config.patching.mean_patch_size == run.unit or run.config.patching.scheme == "space"


def test_a_budget_that_the_other_parts_exceed_is_refused(study: ModuleType) -> None:
    values = {"patching.scheme": "static", "patching.patch_size": 4, "patching.max_patch_length": None}
    with pytest.raises(SystemExit, match="its other parts alone"):
        study._width("blt", values, "model.latent.ffn_dim", budget=1e6, unit=4.0)


def test_models_are_chosen_by_their_folders(study: ModuleType) -> None:
    assert study.chosen(None) == list(study.VARIANTS)
    names = [variant.name for variant in study.chosen("bpe,blt-entropy-4.5-seed-1")]
    assert names == ["BPE", "BLT, entropy 4.5, seed 1"]
    with pytest.raises(SystemExit, match="--models blt: choose from byte-level, bpe, "):
        study.chosen("blt")
