"""The token-level baseline: the same trainer, bits per byte, a checkpoint with its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from blt.checkpoint import models
from blt.checkpoint.formats import open_source
from blt.checkpoint.models import Checkpoint, build
from blt.data.dataset import Dataset
from blt.evaluate.rows import scorer_of
from blt.train import checkpoints, train
from blt.train.config import BPERun, load_config
from blt.train.setup import prepare_run
from blt_export import export
from blt_runtime.errors import CheckpointError, ConfigError


@pytest.fixture
def bpe_config(repo: Path) -> BPERun:
    config = load_config(repo / "configs" / "tiny-bpe.yaml", ["data.valid_bytes=1048576"])
    assert isinstance(config, BPERun)
    return config


@pytest.fixture(scope="module")
def bpe_run(repo: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "bpe"
    train(load_config(repo / "configs" / "tiny-bpe.yaml", ["data.valid_bytes=1048576"]), out, data=data)
    return out


def test_it_learns_and_its_checkpoint_holds_the_tokenizer(bpe_run: Path) -> None:
    lines = [json.loads(line) for line in (bpe_run / "metrics.jsonl").read_text().splitlines()]
    valid = [line["valid_bpb"] for line in lines if "valid_bpb" in line]
    assert valid[-1] < valid[0] < 8
    saved = models.load(bpe_run)
    assert (saved.blt, saved.entropy, saved.patch_rule) == (None, None, None)
    assert saved.bpe is not None
    assert saved.vocabulary is not None
    assert saved.bpe.config.vocab_size == 300
    assert saved.vocabulary.text == (bpe_run / "tokenizer.json").read_text()


def test_validation_is_what_eval_counts(bpe_run: Path, data: Path) -> None:
    """Bits of every token and EOS of each document, divided by its bytes. Training masks documents in a row from each
    other, but cuts some where a row ends. So the two numbers agree approximately."""
    lines = [json.loads(line) for line in (bpe_run / "metrics.jsonl").read_text().splitlines()]
    found = next(line for line in reversed(lines) if "valid_bpb" in line)
    documents, scorer = Dataset(data).split("valid"), scorer_of(models.load(bpe_run))
    bits = sum(scorer.bits(documents.bytes(i), eos=True) for i in range(len(documents)))
    assert found["valid_bytes"] == documents.n_bytes
    assert found["valid_bpb"] == pytest.approx(bits / documents.n_bytes, rel=0.03)


def test_flops_in_the_metrics_are_those_of_the_formula(bpe_run: Path, data: Path) -> None:
    saved = models.load(bpe_run)
    assert saved.bpe is not None
    assert saved.vocabulary is not None
    documents = Dataset(data).split("train")
    tokens = sum(len(saved.vocabulary.encode(documents.bytes(i))) for i in range(len(documents)))
    per_byte = saved.bpe.config.flops_per_byte(64, documents.n_bytes / tokens)
    line = json.loads((bpe_run / "metrics.jsonl").read_text().splitlines()[0])
    assert line["flops"] == pytest.approx(3 * per_byte * line["bytes"])


def test_stop_and_resume_is_bit_exact(bpe_config: BPERun, data: Path, tmp_path: Path) -> None:
    whole = prepare_run(bpe_config, tmp_path / "whole", data)[0]
    losses = [whole.train_step() for _ in range(8)]
    first = prepare_run(bpe_config, tmp_path / "run", data)[0]
    for _ in range(3):
        first.train_step()
    first.save()
    second = prepare_run(bpe_config, tmp_path / "run", data)[0]
    found = checkpoints.read_newest(second.folder)
    assert found is not None
    second.restore(found)
    assert [second.train_step() for _ in range(5)] == losses[3:]
    assert second.state.bytes == whole.state.bytes


def test_another_vocabulary_does_not_resume(bpe_config: BPERun, data: Path, tmp_path: Path, repo: Path) -> None:
    short = bpe_config.model_copy(update={"schedule": bpe_config.schedule.model_copy(update={"steps": 5})})
    train(short, tmp_path / "run", data=data)
    other = load_config(repo / "configs" / "tiny-bpe.yaml", ["tokenizer.vocab_size=310", "schedule.steps=5"])
    with pytest.raises(CheckpointError):
        train(other, tmp_path / "run", data=data)


def test_a_run_from_a_tokenizer_file(bpe_config: BPERun, bpe_run: Path, data: Path, tmp_path: Path, repo: Path) -> None:
    path = bpe_run / "tokenizer.json"
    config = load_config(repo / "configs" / "tiny-bpe.yaml", [f"tokenizer.path={path}"])
    trainer, finish = prepare_run(config, tmp_path, data)
    trainer.train_step()
    vocabulary = finish().vocabulary
    assert vocabulary is not None
    assert vocabulary.text == path.read_text()
    small = load_config(repo / "configs" / "tiny-bpe.yaml", [f"tokenizer.path={path}", "tokenizer.vocab_size=280"])
    with pytest.raises(ConfigError, match="has 300 ids"):
        prepare_run(small, tmp_path, data)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.patches=4", "rows of tokens"),
        ("batch.byte_buckets=[1024]", "max_seqlen"),
        ("model.vocab_size=400", "leave one out"),
        ("tokenizer.vocab_size=100", "tokenizer.vocab_size"),
        ("tokenizer.size=1", "nearest known one is 'tokenizer.vocab_size'"),
        ("patching.scheme=space", "unknown key 'patching'"),
    ],
)
def test_invalid_settings_are_named(repo: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(repo / "configs" / "tiny-bpe.yaml", [override])
    assert "\n" not in str(caught.value)


def test_unsupported_uses_are_refused(bpe_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="token-level baseline"):
        export(bpe_run, tmp_path / "bundle")
    with pytest.raises(CheckpointError, match="token-level baseline"):
        models.load(bpe_run).require_blt()


def test_a_checkpoint_with_a_wrong_tokenizer(bpe_run: Path, tmp_path: Path) -> None:
    content = torch.load(bpe_run / "model.pt", weights_only=True)
    for text, message in ((None, "no tokenizer"), ("{}", "is not a tokenizer.json")):
        content["config"]["tokenizer"] = text
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match=message):
            build(open_source(tmp_path / "model.pt"))


def test_a_saved_copy_is_the_same(bpe_run: Path, tmp_path: Path) -> None:
    saved = models.load(bpe_run)
    assert saved.bpe is not None
    models.save(tmp_path / "again.pt", Checkpoint(None, None, None, saved.bpe, saved.vocabulary))
    again = models.load(tmp_path / "again.pt")
    assert again.bpe is not None
    for name, tensor in saved.bpe.state_dict().items():
        assert torch.equal(tensor, again.bpe.state_dict()[name])
    assert scorer_of(saved).bits(b"byte latent") == scorer_of(again).bits(b"byte latent")
