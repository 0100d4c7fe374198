"""One interface for bits: streams and whole rows agree, chances multiply, every byte and EOS is counted once."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from blt.checkpoint.models import Checkpoint, save
from blt.cli import devices
from blt.cli.options import ModelOptions
from blt.cli.scorers import open_scorer
from blt.data import BatchShape, Dataset, Loader, prepare
from blt.data.batches import Pack
from blt.evaluate.rows import PatchRows, load_on, scorer_of
from blt.evaluate.scoring import Scorer, StreamScorer, bits_of
from blt.evaluate.texts import Document
from blt.model.hashing import MappedTables
from blt.model.token import TokenConfig, TokenModel
from blt.model.vocabulary import train_vocabulary
from blt.train.objective import Objective
from blt_runtime.errors import CheckpointError, UsageError
from blt_runtime.ids import EOS
from tests.tiny import VARIANTS, tiny

TEXT = "Bytes, not tokens — über alles. ".encode() * 4


def token_model() -> Checkpoint:
    vocabulary = train_vocabulary([TEXT], 280)
    model = TokenModel(TokenConfig(dim=16, n_layers=1, n_heads=2, ffn_dim=32, max_seqlen=200, vocab_size=280))
    model.init_weights(torch.Generator().manual_seed(0))
    return Checkpoint(None, None, None, model.eval(), vocabulary)


def scorers() -> dict[str, Scorer]:
    whole = tiny()
    return {
        "patches": scorer_of(whole),
        "stream": scorer_of(whole, 10_000),
        "bytes": scorer_of(Checkpoint(None, whole.entropy, None)),
        "tokens": scorer_of(token_model()),
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_whole_rows_and_streams_agree(name: str) -> None:
    checkpoint = tiny(name)
    rows, stream = scorer_of(checkpoint), scorer_of(checkpoint, 10_000)
    assert isinstance(rows, PatchRows)
    assert isinstance(stream, StreamScorer)
    for arguments in ((TEXT, b"", True), (TEXT[40:], TEXT[:40], False), (b"", TEXT, True)):
        ours, theirs = rows.measure(*arguments), stream.measure(*arguments)
        assert ours.bits == pytest.approx(theirs.bits, rel=1e-5)
        assert ours.units == theirs.units


def test_the_chain_rule() -> None:
    """p(prompt) p(text | prompt) = p(prompt text), where both are read in the same units."""
    found = scorers()
    assert {scorer.unit for scorer in found.values()} == {"patch", "byte", "token"}
    for name, scorer in found.items():
        prompt, text = TEXT[:33], TEXT[33:90]  # after a space: a token ends there
        whole = scorer.bits(prompt + text, eos=True)
        assert scorer.bits(prompt) + scorer.bits(text, prompt, eos=True) == pytest.approx(whole, rel=1e-4), name
        assert scorer.bits(text, prompt) < scorer.bits(text, prompt, eos=True)
        assert scorer.bits(b"") == 0.0


@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_the_loss_counts_what_eval_counts(pack: Pack, tmp_path: Path) -> None:
    """Documents in one row are masked from each other, so the row's nats are the sum of those of each document."""
    model = tiny().entropy
    assert model is not None
    (tmp_path / "text").write_bytes(b"one\0the second\0\xff\xfe\0and the last of them")
    prepare([tmp_path / "text"], tmp_path / "data", split=(1, 0, 0))
    documents = Dataset(tmp_path / "data").split("train")
    (batch,) = Loader(documents, BatchShape(1, (100,), pack=pack)).one_pass()
    with torch.no_grad():
        nats, _ = Objective(model)(batch)
    scorer = scorer_of(Checkpoint(None, model, None))
    found = [scorer.measure(documents.bytes(i), eos=True) for i in range(len(documents))]
    assert nats.item() / np.log(2) == pytest.approx(sum(part.bits for part in found), rel=1e-5)
    assert batch.n_targets == sum(part.units for part in found)
    assert batch.n_bytes == documents.n_bytes == 35


def test_continued_pieces_are_the_rows_of_training(tmp_path: Path) -> None:
    model = tiny().entropy
    assert model is not None
    text = TEXT[:101]
    (tmp_path / "text").write_bytes(text)
    prepare([tmp_path / "text"], tmp_path / "data", split=(1, 0, 0))
    documents = Dataset(tmp_path / "data").split("train")
    scorer = scorer_of(Checkpoint(None, model, None))
    found = list(scorer.measure_pieces(Document("", text), 40, continued=True))
    nats = 0.0
    for batch in Loader(documents, BatchShape(1, (40,))).one_pass():
        with torch.no_grad():
            nats += Objective(model)(batch)[0].item()
    assert [n_bytes for _, n_bytes in found] == [40, 40, 21]
    assert sum(part.bits for part, _ in found) == pytest.approx(nats / np.log(2), rel=1e-5)
    assert sum(part.units for part, _ in found) == 102
    restarted = scorer.measure_pieces(Document("", text), 40)
    assert sum(part.bits for part, _ in restarted) != pytest.approx(nats / np.log(2), rel=1e-5)


@pytest.mark.parametrize("prompt", [0, 33, 60])
def test_continued_pieces_count_every_byte_once(prompt: int) -> None:
    """Tokens stay whole: those of the document, each in the piece where it ends."""
    document = Document("", TEXT[:100], prompt=prompt)
    for name, scorer in scorers().items():
        whole, pieces = (
            scorer.measure(TEXT[prompt:100], TEXT[:prompt], eos=True),
            [*scorer.measure_pieces(document, 30, True)],
        )
        assert sum(n_bytes for _, n_bytes in pieces) == 100 - prompt, name
        if name in ("bytes", "tokens"):
            assert sum(part.units for part, _ in pieces) == whole.units, name
        (one,) = scorer.measure_pieces(document, 100, True)
        assert one == (whole, 100 - prompt), name


def test_a_continued_piece_of_tokens_by_hand() -> None:
    checkpoint = token_model()
    assert checkpoint.bpe is not None
    assert checkpoint.vocabulary is not None
    ids = checkpoint.vocabulary.encode(TEXT[:60])
    ends = np.cumsum(checkpoint.vocabulary.token_bytes[ids])
    first = int(np.searchsorted(ends, 30, side="right"))
    _, (second, n_bytes) = scorer_of(checkpoint).measure_pieces(Document("", TEXT[:60]), 30, continued=True)
    row = torch.as_tensor(np.concatenate([ids[first - 1 :], [EOS]]))[None]
    with torch.no_grad():
        logits = checkpoint.bpe(row)[0].double()
    by_hand = -torch.log_softmax(logits, -1)[:-1].gather(1, row[0, 1:, None]).sum() / np.log(2)
    assert second.bits == pytest.approx(by_hand.item(), rel=1e-5)
    assert n_bytes == 60 - ends[first - 1]


def test_units_are_those_of_the_text() -> None:
    found = scorers()
    assert found["bytes"].measure(TEXT, b"prompt", eos=True).units == len(TEXT) + 1
    vocabulary = token_model().vocabulary
    assert vocabulary is not None
    assert found["tokens"].measure(TEXT, b"prompt").units == len(vocabulary.encode(TEXT)) < len(TEXT)


def test_token_bits_by_hand() -> None:
    checkpoint = token_model()
    assert checkpoint.bpe is not None
    assert checkpoint.vocabulary is not None
    ids = torch.tensor([[1, *checkpoint.vocabulary.encode(TEXT), 2]])
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(checkpoint.bpe(ids)[0, :-1].double(), ids[0, 1:], reduction="sum")
    assert scorer_of(checkpoint).bits(TEXT, eos=True) == pytest.approx(nats.item() / np.log(2), rel=1e-6)


def test_a_text_that_is_too_long_is_an_error() -> None:
    for name, scorer in scorers().items():
        if name != "stream":
            assert scorer.capacity is not None
            scorer.bits(b"x" * scorer.capacity, eos=True)
            long = bytes(range(256)) * (1 + scorer.capacity // 100)
            with pytest.raises(UsageError, match="give a shorter text"):
                scorer.bits(long)


def test_one_very_long_patch_is_read_by_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny()
    assert whole.patch_rule is not None
    checkpoint = replace(whole, patch_rule=replace(whole.patch_rule, threshold=99.0))
    expected = scorer_of(checkpoint).measure(TEXT)
    monkeypatch.setattr("blt.evaluate.rows.GATHER_BYTES", 1000)
    rows = scorer_of(checkpoint)
    found = rows.measure(TEXT)
    assert "stream" in vars(rows)
    assert found.bits == pytest.approx(expected.bits, rel=1e-5)
    assert found.units == expected.units


def test_hash_tables_go_to_the_device_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables that are mapped from their file work on the CPU only. The device `meta` replaces an accelerator."""
    save(tmp_path / "model.pt", tiny())
    here, there = load_on("cpu", tmp_path / "model.pt"), load_on("meta", tmp_path / "model.pt")
    assert here.blt is not None
    assert there.blt is not None
    assert here.blt.hash_embedding is not None
    assert isinstance(here.blt.hash_embedding.tables, MappedTables)
    held = dict(there.blt.named_parameters())
    assert any("hash" in name for name in held)
    assert {parameter.device.type for parameter in held.values()} == {"meta"}
    monkeypatch.setattr(devices, "torch_device", lambda device: "meta")
    with open_scorer(tmp_path / "model.pt", 100, ModelOptions(device="cuda")) as scorer:
        assert isinstance(scorer, PatchRows)
        assert scorer.device == "meta"
        assert {parameter.device.type for parameter in scorer.blt.parameters()} == {"meta"}


def test_no_stream_reads_weights_of_another_device(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Longer texts are cut to the rows, with a warning; a long patch is refused. (The weights stay on the CPU here.)"""
    checkpoint = tiny("static")
    with caplog.at_level(logging.WARNING, "blt.evaluate.scoring"):
        rows = scorer_of(checkpoint, 10_000, "cuda")
    assert isinstance(rows, PatchRows)
    assert f"at most {rows.capacity} bytes" in caplog.text
    monkeypatch.setattr("blt.evaluate.rows.GATHER_BYTES", 1000)
    with pytest.raises(UsageError, match="use --device cpu"):
        rows.measure(TEXT)


def test_an_incomplete_checkpoint_has_no_scorer() -> None:
    with pytest.raises(CheckpointError):
        scorer_of(Checkpoint(tiny().blt, None, None))


def test_bits_of_certain_and_uniform_predictions() -> None:
    ids = np.array([1, 5, 7])
    logits = np.full((3, 260), -1e9, np.float32)
    logits[0, 5], logits[1, 7] = 0, 0
    assert bits_of(logits, ids) == 0
    assert bits_of(np.zeros((3, 256), np.float32), ids) == pytest.approx(16)
    assert bits_of(np.zeros((3, 256), np.float32), ids, first=2) == pytest.approx(8)
