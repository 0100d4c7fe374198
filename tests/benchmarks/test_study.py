"""benchmarks/study.py: every model of the study has the same FLOPs per byte. Nothing is trained."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from blt.data import Dataset, prepare
from blt.model.config import BLTConfig
from blt.train.config import BLTRun, BPERun

MODELS = 13


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
    variants = study._variants()
    assert len(variants) == MODELS
    run = study.fitted(variants[number], data, 3_000_000)
    budget = study._flops(study.fitted(variants[0], data, 3_000_000).config, None)
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
    assert study.chosen(None) == list(study._variants())
    names = [variant.name for variant in study.chosen("bpe,blt-entropy-4.5")]
    assert names == ["BPE", "BLT, entropy 4.5"]
    with pytest.raises(SystemExit, match="--models blt: choose from byte-level, byte-level-with-n-grams, bpe, "):
        study.chosen("blt")


def test_the_controls_have_tables_of_the_size_of_the_blts(study: ModuleType, data: Dataset) -> None:
    def parameters(name: str) -> int:
        config = study.fitted(next(v for v in study._variants() if v.name == name), data, 3_000_000).config.model
        return int(config.hash.params(config.local_dim if isinstance(config, BLTConfig) else config.dim))

    wanted = parameters("BLT, space")
    assert parameters("byte-level with n-grams") == pytest.approx(wanted, rel=0.001)
    assert parameters("BPE with n-grams") == pytest.approx(wanted, rel=0.001)


def test_every_family_has_a_pilot_of_its_own(study: ModuleType) -> None:
    by_name = {variant.name: variant for variant in study._variants()}
    assert {variant.family for variant in by_name.values()} == set(study.PILOTS)
    assert all(by_name[name].family == family for family, name in study.PILOTS.items())


@pytest.mark.parametrize("best", [1e-3, 4e-3, 32e-3])
def test_pilots_go_on_while_the_best_rate_is_at_an_end(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch, best: float
) -> None:
    pilots = study.Study.__new__(study.Study)
    monkeypatch.setattr(study.Study, "_pilot", lambda self, variant, rate: rate)
    monkeypatch.setattr(study.Study, "_valid", lambda self, rate: abs(rate - best))
    tried = pilots._tried(study._variants()[0])
    assert min(tried, key=tried.get) == best
    assert {best / 2, best, best * 2} <= set(tried)


def test_the_best_pilot_is_the_run_of_the_study(
    study: ModuleType, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def blt(*arguments: object, log: Path) -> str:
        folder = Path(str(arguments[arguments.index("-o") + 1]))
        folder.mkdir(parents=True)
        (folder / "model.pt").touch()
        trained.append(str(folder.relative_to(tmp_path)))
        return ""

    monkeypatch.setattr(study, "_blt", blt)
    one = study.Study.__new__(study.Study)
    one.args, one.out, one.data, one.shared = Namespace(megabytes=3.0, data="DATA"), tmp_path, data, []
    variant = study._variants()[0]
    one._pilot(variant, 0.004)
    for seed, rate in ((0, 0.004), (1, 0.004)):
        assert one.train(study.fitted(variant, data, 3_000_000, seed, rate)).exists()
    assert trained == ["pilots/byte-level-0.004-3MB", "byte-level-seed-1"]
    assert (tmp_path / "byte-level").resolve().name == "byte-level-0.004-3MB"
    one.args.megabytes = 6.0
    (tmp_path / "byte-level").unlink()
    one.train(study.fitted(variant, data, 6_000_000, 0, 0.004))
    assert trained[2:] == ["byte-level"], "a shorter pilot is not the run"


def test_rows_of_several_seeds_are_one_line(study: ModuleType) -> None:
    row = {"model": "BPE", "flops_per_byte": 2e6, "bytes": 8e6, "bytes_per_patch": 3.0, "baselines": {}}
    rows = [{**row, "test_bits_per_byte": bits, "kinds": {"book": bits}} for bits in (2.0, 2.1, 2.3)]
    assert study._table(rows)[2:] == ["| BPE | 3 | 2.000 | 8.00 | 3.00 | 2.133 ± 0.150 | 2.133 |"]


def test_bits_of_a_language_weigh_its_groups_by_bytes(study: ModuleType) -> None:
    groups = {"a.ta": (2.0, 10), "b.ta": (4.0, 30), "a.en": (1.0, 5)}
    reports = {name: {"bits_per_byte": bits, "bytes": size} for name, (bits, size) in groups.items()}
    assert study.bits_by(1, reports) == {"en": 1.0, "ta": 3.5}
    assert study.bits_by(0, reports) == {"a": pytest.approx(25 / 15), "b": 4.0}
