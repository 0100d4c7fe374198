"""Weights and temperature of a configuration: what a run reads, what it says about it, and what it refuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from blt.data import Dataset, prepare
from blt.train import train
from blt.train.config import load_config, parse_config
from blt.train.inputs import RunInputs, prepare_inputs
from blt_runtime.errors import CheckpointError, ConfigError

MIX = 'data.mix={"code.*": 4, code.go: 2}'


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training text: 3 kB of code.go, 3 kB of code.py, 12 kB of book.en; validation text of book.en alone."""
    folder = tmp_path_factory.mktemp("mixed")
    random = np.random.default_rng(0)
    for split, groups in {"train": {"code.go": 30, "code.py": 30, "book.en": 120}, "valid": {"book.en": 9}}.items():
        (folder / "text" / split).mkdir(parents=True)
        for group, count in groups.items():
            documents = [bytes(random.integers(97, 123, 100, np.uint8)) for _ in range(count)]
            (folder / "text" / split / f"{group}.txt").write_bytes(b"\0".join(documents))
    prepare([folder / "text"], folder / "data")
    return folder / "data"


def inputs_of(repo: Path, data: Path, *options: str, kind: str = "tiny-entropy") -> RunInputs:
    return prepare_inputs(load_config(repo / "configs" / f"{kind}.yaml", options), data)


def shares_read(data: Path, order: np.ndarray) -> dict[str, float]:
    documents = Dataset(data).split("train")
    groups = np.bincount(documents.group_ids[order], documents.lengths[order], minlength=len(documents.names))
    return dict(zip(documents.names, (groups / groups.sum()).tolist(), strict=True))


def test_every_kind_of_run_reads_the_same_mixture(repo: Path, mixed: Path) -> None:
    """The last pattern that matches a group gives its weight: 2 * 3, 4 * 3 and 1 * 12 parts."""
    space, tokens = ["patching.scheme=space", "patching.max_patch_length=8"], ["tokenizer.vocab_size=280"]
    orders = [
        inputs_of(repo, mixed, MIX, *options, kind=kind).training.reached(1 << 40)
        for kind, options in (("tiny-entropy", []), ("tiny", space), ("tiny-bpe", tokens))
    ]
    assert shares_read(mixed, orders[0]) == pytest.approx({"code.go": 0.2, "code.py": 0.4, "book.en": 0.4}, abs=0.01)
    for order in orders[1:]:
        np.testing.assert_array_equal(order, orders[0])


def test_temperatures_of_groups_and_of_languages(repo: Path, mixed: Path) -> None:
    for options, expected in {
        ("data.temperature=0",): [1 / 3, 1 / 3, 1 / 3],
        ("data.temperature=0.5",): [0.25, 0.25, 0.5],
        ("data.temperature=0", "data.groups=[code.go, book.en]"): [0.5, 0.0, 0.5],
        ("data.temperature=0", "data.mix={book.en: 2}", "data.temperature_by=language"): [0.25, 0.25, 0.5],
    }.items():
        found = shares_read(mixed, inputs_of(repo, mixed, *options).training.reached(1 << 40))
        assert [found[name] for name in ("code.go", "code.py", "book.en")] == pytest.approx(expected, abs=0.01)


def test_validation_and_runs_without_weights_are_not_mixed(repo: Path, mixed: Path) -> None:
    plain, same, mixture = (inputs_of(repo, mixed, *more) for more in ([], ["data.mix={}"], [MIX]))
    assert plain.mixture is same.mixture is None
    assert "mixture" not in plain.extra
    orders = []
    for inputs in (plain, mixture):
        make = inputs.loaders["valid"]
        assert make is not None
        orders.append(make().reached(1 << 40))
    np.testing.assert_array_equal(orders[0], orders[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data.mix={kode.*: 2}"], r"data.mix: 'kode.\*' matches no group of the training text; the nearest name is"),
        (["data.mix={book.en: 2}", "data.groups=[code.go]"], "data.mix: 'book.en' matches no group that data.groups"),
        (["data.mix={code.go: 0}"], "data.mix.code.go: Input should be greater than 0"),
        (["data.mix={code.go: -1}"], "data.mix.code.go: Input should be greater than 0"),
        (["data.mix={code.go: .inf}"], "data.mix.code.go: .* finite"),
        (["data.temperature=-1"], "data.temperature: .* greater than or equal to 0"),
        (["data.temperature=5"], "data.temperature: .* give 1 / T"),
        (["data.temperature_by=kind"], "data.temperature_by: "),
    ],
)
def test_a_wrong_mixture_is_one_error(repo: Path, mixed: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        inputs_of(repo, mixed, *options)


def test_a_run_says_how_often_it_reads_a_group(repo: Path, mixed: Path, caplog: pytest.LogCaptureFixture) -> None:
    """8 rows of 64 bytes, 100 steps: 51.2 kB, of which 3 kB of code.py get 40 %."""
    caplog.set_level(logging.INFO, "blt")
    options = ["batch.rows=8", "batch.byte_buckets=[64]", "schedule.steps=100"]
    inputs = inputs_of(repo, mixed, MIX, *options)
    assert (
        "the run reads about 51.2 kB of a mixture of 3 groups: code.py 6.83 times, code.go 3.41 times, "
        "book.en 1.71 times" in caplog.text
    )
    assert "1 of 3 groups are read more than 4 times, code.py most often (6.8 times)" in caplog.text
    report = inputs.dry_run()["mixture"]
    assert report["run_bytes"] == 51200
    assert report["share"] == pytest.approx({"code.go": 0.2, "code.py": 0.4, "book.en": 0.4})
    assert report["epochs"]["code.py"] == pytest.approx(0.4 * 51200 / 3000)
    caplog.clear()
    inputs_of(repo, mixed, MIX, *options, "schedule.steps=50")
    assert "more than 4 times" not in caplog.text
    assert "mixture" not in inputs_of(repo, mixed, *options).dry_run()


def test_a_resumed_run_has_the_same_mixture(repo: Path, mixed: Path, tmp_path: Path) -> None:
    def config(*options: str) -> object:
        path = repo / "configs" / "tiny-entropy.yaml"
        return load_config(path, ["run.compile=false", "schedule.warmup=0", "run.log_every=1", *options])

    def losses(out: Path) -> list[float]:
        records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        return [record["loss"] for record in records if "loss" in record]

    steps = "schedule.decay_steps=6"
    train(config(MIX, steps, "schedule.steps=6"), tmp_path / "whole", data=mixed)  # type: ignore[arg-type]
    train(config(MIX, steps, "schedule.steps=3"), tmp_path / "run", data=mixed)  # type: ignore[arg-type]
    for other in ("data.mix={}", "data.mix={code.go: 2}", 'data.mix={code.go: 2, "code.*": 4}'):
        with pytest.raises(CheckpointError, match="another mixture"):
            train(config(other, steps, "schedule.steps=6"), tmp_path / "run", data=mixed)  # type: ignore[arg-type]
    train(config(MIX, steps, "schedule.steps=6"), tmp_path / "run", data=mixed)  # type: ignore[arg-type]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert parse_config(saved).data.mix == {"code.*": 4, "code.go": 2}
