"""Runs that start from a checkpoint or a Llama: which weights are used, what is checked, and a fine-tuned model."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from blt.checkpoint import models
from blt.checkpoint.formats import open_source
from blt.cli import run
from blt.data import prepare
from blt.model import TransformerConfig
from blt.train import train
from blt.train.config import BLTRun, EntropyRun, load_config, parse_config
from blt.train.initial_weights import initialise
from blt.train.setup import prepare_run
from blt_runtime import Model
from blt_runtime.errors import CheckpointError, ConfigError

PAIRS = {"Capital of France?": " Paris", "Capital of Peru?": " Lima", "Two and two?": " four"}
SMALL = {"data": {"valid_bytes": 4096}, "run": {"compile": False, "log_every": 10, "checkpoint_every": 100}}


@pytest.fixture(scope="module")
def blt_run(tmp_path_factory: pytest.TempPathFactory, data: Path, entropy_run: Path, repo: Path) -> Path:
    """A finished tiny BLT run with entropy patches."""
    out = tmp_path_factory.mktemp("start") / "blt"
    config = load_config(repo / "configs" / "tiny.yaml", ["schedule.steps=10", "patching.monotonic=true"])
    train(config, out, data=data, entropy_model=entropy_run)
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in PAIRS.items()]
    (folder / "pairs.jsonl").write_text("\n".join(lines * 8))
    source = folder / "pairs.jsonl"
    fields: dict[str, Any] = {"prompt_field": "prompt", "completion_field": "completion"}
    prepare([source], folder / "data", split=(1, 0, 0), **fields)
    return folder / "data"


def tuning(path: Path, **sections: Any) -> BLTRun:
    batch = {"rows": 4, "patches": 32, "byte_buckets": [96, 128]}
    config = parse_config({"kind": "blt", "init": {"checkpoint": str(path)}, "batch": batch, **SMALL, **sections})
    assert isinstance(config, BLTRun)
    return config


def test_model_rule_and_entropy_model_are_the_checkpoints(blt_run: Path, data: Path, tmp_path: Path) -> None:
    loaded = models.load(blt_run, trainable=True)
    blt, rule = loaded.require_blt()
    config = tuning(blt_run)
    assert config.model == blt.config
    assert config.entropy_model == str(blt_run)
    trainer, finish = prepare_run(config, tmp_path, data)
    for name, weight in trainer.objective.model.state_dict().items():
        assert torch.equal(weight, blt.state_dict()[name]), name
    assert finish().patch_rule == rule
    assert rule.monotonic
    found, wanted = finish().entropy, loaded.entropy
    assert found is not None
    assert wanted is not None
    assert all(torch.equal(found.state_dict()[name], weight) for name, weight in wanted.state_dict().items())


def test_settings_of_a_section_override_the_checkpoint(blt_run: Path) -> None:
    rule = open_source(blt_run).patch_rule
    assert rule is not None
    config = tuning(blt_run, model={"encoder": {"window": 16}}, patching={"max_patch_length": 6})
    assert config.model.encoder.window == 16
    assert config.model.encoder.dim == 16
    assert (config.patching.max_patch_length, config.patching.threshold) == (6, rule.threshold)
    assert tuning(blt_run, patching={"target_patch_size": 3.0}).patching.needs_threshold
    space = tuning(blt_run, patching={"scheme": "space"})
    assert (space.patching.monotonic, space.entropy_model) == (False, None)


def test_a_checkpoint_that_does_not_fit(blt_run: Path, data: Path, tmp_path: Path) -> None:
    for change, words in (
        ({"hash": {"sizes": [3, 5]}}, r"hash .*\[?3, 4.*not .*3, 5"),
        ({"latent": {"n_layers": 1}}, r"latent.n_layers 2 \(not 1\)"),
        ({"encoder": {"n_kv_heads": 1}}, r"encoder.n_kv_heads 2 \(not 1\)"),
    ):
        with pytest.raises(CheckpointError, match=words):
            prepare_run(tuning(blt_run, model=change), tmp_path, data)
    with pytest.raises(CheckpointError, match="holds no BLT"):
        tuning(_entropy_alone(blt_run, tmp_path))
    with pytest.raises(CheckpointError, match="does not exist"):
        tuning(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="not both"):
        tuning(blt_run, init={"checkpoint": str(blt_run), "latent": str(tmp_path)})


def _entropy_alone(blt_run: Path, folder: Path) -> Path:
    path = folder / "entropy.pt"
    models.save(path, replace(models.load(blt_run), blt=None, patch_rule=None))
    return path


def test_options_without_weights_may_differ(blt_run: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = models.load(blt_run, trainable=True).require_blt()[0]
    latent = model.config.latent.model_copy(update={"rope_theta": 1e4, "max_seqlen": 100})
    other = type(model)(model.config.model_copy(update={"latent": latent}))
    with caplog.at_level(logging.WARNING, "blt.train"):
        initialise(other, str(blt_run))
    assert "latent.rope_theta 500000.0, now 10000.0" in caplog.text
    assert "max_seqlen" not in caplog.text
    assert torch.equal(other.decoder.output.weight, model.decoder.output.weight)


def test_an_entropy_run_starts_from_an_entropy_model(blt_run: Path, data: Path, tmp_path: Path) -> None:
    """From the entropy model inside a BLT's checkpoint, too."""
    raw = {"kind": "entropy", "init": {"checkpoint": str(blt_run)}, "batch": {"rows": 2, "byte_buckets": [64]}, **SMALL}
    config = parse_config(raw)
    assert isinstance(config, EntropyRun)
    trainer, _ = prepare_run(config, tmp_path, data)
    entropy = models.load(blt_run).entropy
    assert entropy is not None
    weight = trainer.objective.model.state_dict()["output.weight"]
    assert torch.equal(weight, entropy.output.weight)
    with pytest.raises(ConfigError, match=r"init.latent is for BLT runs"):
        parse_config({**raw, "model": entropy.config.model_dump(), "init": {"latent": str(tmp_path)}})


def test_the_latent_transformer_starts_from_a_llama(data: Path, tmp_path: Path, repo: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=16, max_position_embeddings=256,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config)
    llama.save_pretrained(tmp_path / "llama")
    tiny = load_config(repo / "configs" / "tiny.yaml", ["patching.scheme=space"]).model_dump(mode="json")
    del tiny["model"]["latent"]
    made = parse_config({**tiny, "init": {"latent": str(tmp_path / "llama")}})
    assert isinstance(made, BLTRun)
    assert made.model.latent == TransformerConfig(
        dim=32,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        ffn_dim=48,
        norm_eps=1e-6,
        rope_theta=1e4,
        max_seqlen=256,
    )
    trainer, _ = prepare_run(made, tmp_path / "run", data)
    weights, theirs = trainer.objective.model.state_dict(), llama.state_dict()
    for i in range(3):
        value = theirs[f"model.layers.{i}.self_attn.v_proj.weight"]
        assert torch.equal(weights[f"latent.layers.{i}.attention.wv.weight"], value)


def test_from_the_facebook_format(golden: Path, data: Path, tmp_path: Path) -> None:
    """Everything is found. The facebook format needs no longest patch, training does."""
    with pytest.raises(ConfigError, match="max_patch_length"):
        tuning(golden / "a" / "blt")
    config = tuning(golden / "a" / "blt", patching={"max_patch_length": 12})
    trainer, finish = prepare_run(config, tmp_path, data)
    loaded = models.load(golden / "a" / "blt", trainable=True, entropy_dtype="float32")
    blt, rule = loaded.require_blt()
    assert finish().patch_rule == replace(rule, max_patch_length=12)
    for name, weight in trainer.objective.model.state_dict().items():
        assert torch.equal(weight, blt.state_dict()[name]), name


def test_a_resumed_run_keeps_its_parts(blt_run: Path, data: Path, tmp_path: Path) -> None:
    """Frozen parts and separate learning rates: the weights are those of an uninterrupted run."""
    parts = {"freeze": ["encoder.*"], "lr_scale": {"latent.*": 0.1, "decoder.*": 2.0}}
    sections = {"optimizer": parts, "schedule": {"steps": 6, "warmup": 1}}
    run_settings = {"compile": False, "log_every": 10, "checkpoint_every": 3, "keep_checkpoints": 5}
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(tuning(blt_run, run=run_settings, **sections), whole, data=data)
    shutil.copytree(whole, again)
    (again / "model.pt").unlink()
    newest = max((again / "checkpoints").iterdir())
    shutil.rmtree(newest)
    train(tuning(blt_run, run=run_settings, **sections), again, data=data)
    weights = [models.load(out, trainable=True).require_blt()[0].state_dict() for out in (whole, again)]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    other = tuning(blt_run, run=run_settings, schedule=sections["schedule"], optimizer={"freeze": ["encoder.*"]})
    with pytest.raises(CheckpointError, match="lr_scale"):
        train(other, again, data=data)


@pytest.mark.slow
def test_a_fine_tuned_model_is_exported_and_generates(blt_run: Path, pairs: Path, tmp_path: Path) -> None:
    """From a checkpoint to a bundle: only completions are learned, and frozen parts do not change."""
    optimizer = {"lr": 1e-2, "freeze": ["encoder.*", "latent.layers.0.*"], "lr_scale": {"hash_embedding.*": 0.5}}
    config = tuning(blt_run, optimizer=optimizer, schedule={"steps": 100, "warmup": 5}, patching={"scheme": "space"})
    out = tmp_path / "tuned"
    train(config, out, data=pairs)
    before = models.load(blt_run, trainable=True).require_blt()[0].state_dict()
    after = models.load(out, trainable=True).require_blt()[0].state_dict()
    for name, weight in after.items():
        frozen = name.startswith(("encoder.", "latent.layers.0."))
        assert torch.equal(weight, before[name]) == frozen, name
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < 0.1 < losses[0]
    assert run(["export", str(out), "-o", str(tmp_path / "bundle"), "--quiet"]) == 0
    stream = Model.open(tmp_path / "bundle").stream()
    for prompt, answer in PAIRS.items():
        stream.reset()
        stream.append(prompt)
        assert b"".join(stream.generate(32, temperature=0.0)).decode() == answer
