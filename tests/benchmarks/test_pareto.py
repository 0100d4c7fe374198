"""benchmarks/pareto.py: token models keep their numbers as Llamas; fronts of points. Nothing is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from blt.checkpoint.models import Checkpoint
from blt.model.token import TokenConfig, TokenModel
from blt.model.vocabulary import train_vocabulary


@pytest.fixture(scope="module")
def pareto(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("pareto")


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_a_token_model_is_the_same_llama(pareto: ModuleType, tmp_path: Path, kv_heads: int | None) -> None:
    from transformers import LlamaForCausalLM

    config = TokenConfig(dim=16, n_layers=2, n_heads=2, n_kv_heads=kv_heads, ffn_dim=40, max_seqlen=64, vocab_size=300)
    model = TokenModel(config)
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():  # norms are ones otherwise
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    vocabulary = train_vocabulary([b"some text for a vocabulary, some more text"], 300)
    pareto.save_llama(Checkpoint(None, None, None, model.eval(), vocabulary), tmp_path)
    llama = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(4, 300, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(llama(ids).logits, model(ids), atol=1e-5, rtol=1e-4)


def test_models_that_cannot_generate_are_left_out(pareto: ModuleType, tmp_path: Path) -> None:
    names = [
        "byte-level",
        "BPE",
        "BPE with n-grams",
        "BPE, 1024 ids",
        "BLT, space",
        "without hash n-grams",
        "BLT, space",
    ]
    rows = [
        {"model": name, "seed": i // 6, "folder": f"f{i}", "test_bits_per_byte": 2.0, "bytes_per_patch": 3.0}
        for i, name in enumerate(names)
    ]
    (tmp_path / "study.json").write_text(json.dumps(rows))
    assert [model.name for model in pareto.models_of(tmp_path)] == ["BPE", "BPE, 1024 ids", "BLT, space"]


def test_the_front_has_no_point_that_another_beats(pareto: ModuleType) -> None:
    points = [(2.0, 100.0), (2.1, 90.0), (2.2, 150.0), (2.2, 140.0), (1.9, 50.0)]
    curve = pareto.front(points)
    assert curve == [(1.9, 50.0), (2.0, 100.0), (2.2, 150.0)]
    assert [pareto.speed_at(curve, bits) for bits in (1.8, 1.9, 2.15, 3.0)] == [None, 50.0, 100.0, 150.0]


def test_token_models_are_compared_with_blts_of_their_quality(pareto: ModuleType, tmp_path: Path) -> None:
    def row(model: str, bits: float, speed: float, batch: int = 1) -> dict[str, object]:
        return {"model": model, "bits": bits, "unit": 3.0, "precision": "int8", "batch": batch, "bytes_per_s": speed}

    rows = [
        row("BLT, space", 2.0, 120), row("BLT, static 6", 2.2, 300), row("BPE", 2.1, 100),
        row("BPE, 1024 ids", 1.9, 80),
        row("BPE", 2.1, 100, batch=8), row("BLT, space", 2.0, 50, batch=8),
    ]  # fmt: skip
    lines = pareto.compared(rows)
    assert "| int8 | 1 | BPE | 2.100 | 100 | 120 | 1.20 |" in lines
    assert "| int8 | 1 | BPE, 1024 ids | 1.900 | 80 | none |  |" in lines
    assert "| int8 | 8 | BPE | 2.100 | 100 | 50 | 0.50 |" in lines
    pareto.plot(rows, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
