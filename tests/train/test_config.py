"""Configurations: every shipped one loads, and every mistake is named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from blt.train import dry_run
from blt.train.config import BLTRun, EntropyRun, load_config
from blt.train.dryrun import costs, flops_per_byte
from blt_runtime.errors import ConfigError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_is_costed(path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo)  # finetune.yaml names the shipped model
    config = load_config(path)
    kinds = {"entropy": "entropy", "bytes": "entropy", "bpe": "bpe"}
    assert config.kind == next((kinds[word] for word in path.stem.split("-") if word in kinds), "blt")
    report = costs(config)
    assert report["parameters"] == sum(report["parameters_by_part"].values()) == config.model.n_params()
    assert report["flops_per_byte"] > 0


def test_a_dry_run_has_costs_and_memory(repo: Path) -> None:
    config = load_config(repo / "configs" / "tiny.yaml")
    report = dry_run(config)
    assert report.items() > costs(config).items()
    assert report["memory_bytes"]["total"] > 16 * report["parameters"]


def test_the_papers_shapes_have_the_papers_sizes(repo: Path) -> None:
    """Measured sizes of the released models: 19 M, 154 to 160 M, 1.28 B and 3.07 B weights."""
    parts = costs(load_config(repo / "configs" / "blt-1b.yaml"))["parameters_by_part"]
    assert parts["hash tables"] == pytest.approx(3.07e9, rel=0.01)
    assert parts["latent transformer"] == pytest.approx(1.28e9, rel=0.01)
    assert parts["local decoder"] == pytest.approx(1.57e8, rel=0.02)
    assert parts["local encoder"] == pytest.approx(1.9e7, rel=0.05)
    assert costs(load_config(repo / "configs" / "entropy-100m.yaml"))["parameters"] == pytest.approx(1e8, rel=0.02)


def test_overrides(repo: Path) -> None:
    path = repo / "configs" / "tiny.yaml"
    config = load_config(path, ["optimizer.lr=1e-3", "batch.byte_buckets=[64, 80]", "run.dtype=bf16"])
    assert (config.optimizer.lr, config.batch.byte_buckets, config.run.dtype) == (1e-3, (64, 80), "bf16")
    assert load_config(path, ["data.groups=[a]"]).data.groups == ("a",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rat=1", "'optimizer.learning_rat'"),
        ("optimiser.lr=1", "nearest known one is 'optimizer'"),
        ("model.latent.n_layer=1", "nearest known one is 'model.latent.n_layers'"),
        ("model.hash.row=1", "nearest known one is 'model.hash.rows'"),
        ("patching.treshold=1", "nearest known one is 'patching.threshold'"),
        ("model.latent.n_heads=3", "not divisible"),
        ("model.encoder.dim=18", "model.encoder: head size 9 is odd"),
        ("optimizer.lr=-1", "optimizer.lr"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("batch.byte_buckets=[96, 64]", "ascending"),
        ("batch.byte_buckets=[4096]", "max_seqlen"),
        (f"batch.byte_buckets={list(range(50, 83))}", "batch.byte_buckets: .* at most 32"),
        ("batch.patches=null", "batch.patches"),
        ("batch.patches=4000", "max_seqlen"),
        ("patching.max_patch_length=null", "max_patch_length"),
        ("patching.scheme=static", "patch_size"),
        ("patching.scheme=bite", "patching.scheme"),
        ("kind=bpee", "kind is 'bpee'"),
        ("optimizer", "section.key=value"),
        ("kind.x=1", "is a value, not a section"),
        ("run.seed=[", "not YAML"),
        ("run.seed=2024-13-45", "not YAML"),
        ("run.seed=-1", "run.seed"),
        ("kind=[blt]", "kind is"),
        ("optimizer.betas=[2, 3]", "optimizer.betas"),
        ("optimizer.lr=.inf", "optimizer.lr"),
        ("patching.threshold=.nan", "patching.threshold"),
        ("patching={monotonic: true, threshold_add: 1.0}", "not both"),
        ("data.groups=[]", "data.groups"),
        ("model.vocab_size=100", "vocab_size is 100"),
    ],
)
def test_invalid_settings_are_named(repo: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(repo / "configs" / "tiny.yaml", [override])
    assert "\n" not in str(caught.value)


def test_muon_has_no_replicas(repo: Path) -> None:
    with pytest.raises(ConfigError, match=r"muon shards over all ranks; leave run\.shard_ranks out"):
        load_config(repo / "configs" / "tiny.yaml", ["optimizer.name=muon", "run.shard_ranks=2"])


@pytest.mark.parametrize(("patching", "size"), [("scheme: static, patch_size: 6", 6.0), ("scheme: byte", 1.0)])
def test_costs_of_fixed_patches_use_their_size(repo: Path, patching: str, size: float) -> None:
    config = load_config(repo / "configs" / "tiny.yaml", [f"patching={{{patching}}}"])
    assert isinstance(config, BLTRun)
    assert costs(config)["flops_per_byte"] == config.model.flops_per_byte(size, 128)


def test_the_baselines_of_the_demo_have_its_flops(repo: Path) -> None:
    """Per byte and with the entropy model; a token of the demo's text is 4.0 bytes."""
    demo, entropy = (load_config(repo / "configs" / f"{name}.yaml") for name in ("demo", "demo-entropy"))
    assert isinstance(entropy, EntropyRun)
    cost = flops_per_byte(demo, entropy=entropy.model)
    for name in ("demo-bytes", "demo-bpe"):
        assert flops_per_byte(load_config(repo / "configs" / f"{name}.yaml"), bytes_per_token=4.0) == pytest.approx(
            cost, rel=0.02
        )


def test_an_entropy_run_has_no_patches(repo: Path) -> None:
    with pytest.raises(ConfigError, match="rows of bytes"):
        load_config(repo / "configs" / "tiny-entropy.yaml", ["batch.patches=4"])


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path)
    for content, message in {"a: [": "not YAML", "- 1": "not a mapping", "model: {}": "kind is None"}.items():
        path.write_text(content)
        with pytest.raises(ConfigError, match=message) as caught:
            load_config(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("given", "meant"), [("true", "full"), ("false", "none"), ("selective", "selective")])
def test_recomputation_was_a_switch(repo: Path, given: str, meant: str) -> None:
    config = load_config(repo / "configs" / "tiny.yaml", [f"run.activation_checkpointing={given}"])
    assert config.run.activation_checkpointing == meant


@pytest.mark.parametrize("wrong", ["blocks", "1", "null"])
def test_an_unknown_recomputation_is_refused(repo: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        load_config(repo / "configs" / "tiny.yaml", [f"run.activation_checkpointing={wrong}"])
